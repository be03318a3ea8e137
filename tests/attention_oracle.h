// Causal attention in float64, for the tests of both devices and for the case table.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace attention {
using Doubles = std::vector<double>;
using Floats = std::vector<float>;

/// Sizes of one call.
struct Case {
  int64_t B, T, NH, HS;
  int threads = 2;
  int64_t C() const { return NH * HS; }
  std::string str() const {
    return "B=" + std::to_string(B) + ",T=" + std::to_string(T) + ",NH=" + std::to_string(NH) +
           ",HS=" + std::to_string(HS) + ",threads=" + std::to_string(threads);
  }
  /// Index into (B, T, 3C): part 0 is q, 1 k, 2 v.
  size_t qkv(int64_t b, int64_t t, int64_t part, int64_t h, int64_t d) const {
    return static_cast<size_t>((b * T + t) * 3 * C() + part * C() + h * HS + d);
  }
  size_t out(int64_t b, int64_t t, int64_t h, int64_t d) const {
    return static_cast<size_t>((b * T + t) * C() + h * HS + d);
  }
  size_t lse(int64_t b, int64_t h, int64_t t) const { return static_cast<size_t>((b * NH + h) * T + t); }
};

/// What must come out, and how far from it bf16 may lead.
struct Oracle {
  Doubles out, lse, dqkv;
  Doubles out_bound, dqkv_bound;
  Doubles row_max;
};

/// What the forward pass left for the backward pass, when it was not exact.
struct Stored {
  Doubles out, lse;
};

/// The formulas of attention.h, one number at a time.
///
/// The bounds are worst cases of first order, for inputs that are bf16 already. u = 2^-8 is what one rounding
/// to bf16 does to a number at most, relative to it; `slack` is what
/// float32 and its exponentials do to P.
///   out: P is rounded before its product with v, and the result is.
///   D:   inherits the error of the rounded out, unless `stored` tells what that is.
///   dS:  inherits that of D, and is rounded before its products with k and q; P is before its own with dout.
Oracle oracle(const Case& c, const Doubles& x, const Doubles& dout, double slack = 0x1p-14,
              const Stored* stored = nullptr);

Floats random_floats(int64_t count, uint32_t seed, float size = 1.0f);
inline Doubles doubles(const Floats& x) {
  return {x.begin(), x.end()};
}

/// Largest |got - want| over 1 + |want|; infinite when got is not a number.
double worst(const Floats& got, const Doubles& want);
inline bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}
}  // namespace attention
