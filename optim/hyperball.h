// Hyperball: a weight keeps the Frobenius norm that it began with, R = ||W_0||_F, and moves over that sphere:
//
//   W <- R y / ||y||_F,   y = W - c u,   c = lr R / ||u||_F
//
// As a rule's direction u is replaced by
//
//   u' = (W - W') / lr = ((1 - k) W + k c u) / lr,   k = R / ||y||_F,   ||y||_F^2 = W.W - 2 c W.u + c^2 u.u
//
// with W' the new weight, so that the update that all rules share, W <- W - lr u', lands on the sphere. A key
// of every rule (hyperball=1), as in MuonH and AdamH. A zero u leaves W where it is, but for rounding that
// earlier steps have left in its length. A weight that begins at zero would stay there: the optimizer refuses
// it.
//
// Two passes: W and u are read for the three sums, then u' is made, and moves the weight if it is asked to
// (`into`, update.h), with the bits of apply_update. f32 or f64; sums, k and c are float64. Any shape.
// Deterministic, also for any number of threads. A NaN in W or u reaches all of u'. While into.guard is NaN,
// u' is not made. Only enqueues work. No scratch on the CPU; on a GPU hyperball_scratch_bytes().
#pragma once

#include <cmath>
#include <span>

#include "model/kernels/multiplier.h"
#include "optim/update.h"

struct Hyperball {
  Tensor u;            // the direction, replaced by u'; with `into` undefined afterwards
  Tensor w;            // the weight, of as many elements and the same dtype
  Tensor radius;       // (1) R, of that dtype
  double lr;           // what u' will be multiplied by; 0: nothing moves
  bool first = false;  // sets R
  ApplyTo into = {};   // the same weight, where u' is to move it
};

/// Sums over all elements.
struct BallSums {
  double ww = 0, wu = 0, uu = 0;
  HOST_DEVICE BallSums& operator+=(const BallSums& x) {
    ww += x.ww, wu += x.wu, uu += x.uu;
    return *this;
  }
};
/// u' = w W + u u, of these factors.
struct BallStep {
  double w, u;
};
HOST_DEVICE inline BallStep ball_step(const BallSums& sums, double radius, double lr) {
  const double c = sums.uu == 0 ? 0 : lr * radius / std::sqrt(sums.uu);
  const double yy = sums.ww - 2 * c * sums.wu + c * c * sums.uu;
  const double k = yy <= 0 ? 0 : radius / std::sqrt(yy);
  return {(1 - k) / lr, k * c / lr};
}

inline Work work(std::span<const Hyperball> list) {
  Work sum;
  for (const Hyperball& a : list) {
    const double n = bytes_of(a.w);
    sum.bytes += (a.into.w ? 4 : 5) * n + (a.into.w ? work(a.into).bytes - n : 0);
    sum.flops += 10.0 * static_cast<double>(a.w.size());
  }
  return sum;
}

namespace cpu {
void hyperball(Context& ctx, std::span<const Hyperball> list);
}  // namespace cpu
namespace gpu {
void hyperball(Context& ctx, std::span<const Hyperball> list);
}  // namespace gpu

inline void hyperball(Context& ctx, std::span<const Hyperball> list) {
  for (const Hyperball& a : list) {
    expect(a.w.size() == a.u.size() && a.w.dtype == a.u.dtype, "hyperball: u does not fit w");
    expect(a.radius.size() == 1 && a.radius.dtype == a.w.dtype, "hyperball: need one radius of w's dtype");
    expect(!a.into.w || a.into.w.data == a.w.data, "hyperball: moves another weight");
  }
  ON_DEVICE(hyperball, ctx, list);
}

/// Scratch for weights of these sizes, in elements.
int64_t hyperball_scratch_bytes(const Context& ctx, std::span<const int64_t> sizes);
