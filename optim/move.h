// The weight that an operation moves in the pass that makes its direction (ApplyTo of update.h): what the CPU
// halves of such operations share.
#pragma once

#include <cmath>
#include <functional>
#include <limits>

#include "model/kernels/simd.h"
#include "optim/update.h"

namespace cpu {
/// What state keeps of x: 0 of a denormal (update.h), or of what is below another number; of a NaN NaN.
template <typename T>
T kept_of(T x, T least = std::numeric_limits<T>::min()) {
  return std::fabs(x) < least ? T(0) : x;
}

/// The number behind a `scale` or `guard`; 1 when there is none. NaN means: write nothing.
inline float read_scale(const Tensor& scale) {
  return scale ? *scale.f32() : 1.0f;
}

/// ApplyTo; without w nothing is moved.
template <typename T>
struct Target {
  T* w;
  Bf16* copy;
  T step, decay;
  bool everywhere;  // decay does not ask for the sign of u w

  explicit Target(const ApplyTo& into)
      : w(reals_of<T>(into.w)),
        copy(into.copy ? into.copy.bf16() : nullptr),
        step(static_cast<T>(into.step)),
        decay(static_cast<T>(into.decay)),
        everywhere(!into.cautious || into.decay == 0) {}

  void move(int64_t i, T u) const {
    const T old = w[i];
    // A choice between factors, so that compilers fuse the product into the subtraction wherever this stands:
    // the bits must be the same.
    const T lost = everywhere || u * old > 0 ? decay : T(0);
    w[i] = old - lost * old - step * u;
  }
};

/// Where a direction goes: it is kept in u, moves a weight, both or neither. The direction of an element
/// stays in a register until it has moved its weight. (Through a buffer of a block in L1, the same pass took
/// a fifth longer.)
template <typename T>
struct Mover {
  static constexpr int64_t kBlock = 1024;  // elements, whose w is still in L1 when it is rounded for `copy`
  T* u;
  Target<T> target;

  Mover(const Tensor& kept, const ApplyTo& into) : u(reals_of<T>(kept)), target(into) {}

  /// Once through elements [begin, end) of direction(i).
  template <typename Direction>
  void go(int64_t begin, int64_t end, const Direction& direction) const {
    const Mover to = *this;  // a copy: the compiler knows then that nothing below writes to it
    for (int64_t start = begin; start < end; start += kBlock)
      to.block(start, std::min(start + kBlock, end), direction);
  }

 private:
  template <typename Direction>
  void block(int64_t start, int64_t stop, const Direction& direction) const {
    const auto each = [=](const auto& body) {
#pragma omp simd
      for (int64_t i = start; i < stop; ++i) body(i);
    };
    T* const u = this->u;
    const Target<T> target = this->target;
    if (u != nullptr) {
      each([=](int64_t i) { u[i] = direction(i); });
      if (target.w != nullptr) each([=](int64_t i) { target.move(i, u[i]); });
    } else if (target.w != nullptr) {
      each([=](int64_t i) { target.move(i, direction(i)); });
    } else {
      each([=](int64_t i) { direction(i); });
    }
    if (target.copy == nullptr) return;
    each([=](int64_t i) { target.copy[i] = to_bf16(static_cast<float>(target.w[i])); });
  }
};

/// What one entry of a list is to its threads: n elements, and how to go through a range of them. Empty when
/// nothing is to be written.
struct Pass {
  int64_t n = 0;
  std::function<void(int64_t begin, int64_t end)> go = {};
};
/// Of adam_direction.
Pass adam_pass(const AdamDirection& args);
}  // namespace cpu
