// Causal attention in float64, for the tests of both devices and for the case table.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
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
inline Oracle oracle(const Case& c, const Doubles& x, const Doubles& dout, double slack = 0x1p-14,
                     const Stored* stored = nullptr) {
  const auto zeros = [](int64_t count) { return Doubles(static_cast<size_t>(count)); };
  const int64_t outputs = c.B * c.T * c.C();
  Oracle o{zeros(outputs), zeros(c.B * c.NH * c.T), zeros(3 * outputs),
           zeros(outputs), zeros(3 * outputs),      zeros(c.B * c.NH * c.T)};
  const double scale = 1.0 / std::sqrt(static_cast<double>(c.HS)), u = 0x1p-8;
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t h = 0; h < c.NH; ++h)
      for (int64_t i = 0; i < c.T; ++i) {
        Doubles p = zeros(i + 1), dp = p, dp_size = p;
        double max = -std::numeric_limits<double>::infinity(), sum = 0, D = 0, D_size = 0, D_error = 0;
        for (int64_t j = 0; j <= i; ++j) {
          double& s = p[static_cast<size_t>(j)];
          for (int64_t d = 0; d < c.HS; ++d) s += scale * x[c.qkv(b, i, 0, h, d)] * x[c.qkv(b, j, 1, h, d)];
          max = std::max(max, s);
        }
        for (double s : p) sum += std::exp(s - max);
        o.lse[c.lse(b, h, i)] = max + std::log(sum);
        o.row_max[c.lse(b, h, i)] = max;
        const double lse = stored != nullptr ? stored->lse[c.lse(b, h, i)] : o.lse[c.lse(b, h, i)];
        for (double& s : p) s = std::exp(s - lse);
        for (int64_t d = 0; d < c.HS; ++d) {
          const double g = dout[c.out(b, i, h, d)];
          double& out = o.out[c.out(b, i, h, d)];
          double size = 0;
          for (int64_t j = 0; j <= i; ++j) {
            const auto at = static_cast<size_t>(j);
            const double v = x[c.qkv(b, j, 2, h, d)];
            out += p[at] * v;
            size += p[at] * std::abs(v);
            o.dqkv[c.qkv(b, j, 2, h, d)] += p[at] * g;
            o.dqkv_bound[c.qkv(b, j, 2, h, d)] += (u + slack) * p[at] * std::abs(g);
            dp[at] += g * v;
            dp_size[at] += std::abs(g * v);
          }
          const double bound = u * std::abs(out) + (u + slack) * size;
          o.out_bound[c.out(b, i, h, d)] = bound;
          const double known = stored != nullptr ? stored->out[c.out(b, i, h, d)] : out;
          D += g * known;
          D_size += std::abs(g * known);
          D_error += stored != nullptr ? 0 : std::abs(g) * bound;
        }
        for (int64_t j = 0; j <= i; ++j) {
          const auto at = static_cast<size_t>(j);
          const double ds = p[at] * (dp[at] - D) * scale;
          const double error = u * std::abs(ds) + scale * p[at] * (D_error + slack * (dp_size[at] + D_size));
          for (int64_t d = 0; d < c.HS; ++d) {
            const size_t q = c.qkv(b, i, 0, h, d), k = c.qkv(b, j, 1, h, d);
            o.dqkv[q] += ds * x[k];
            o.dqkv[k] += ds * x[q];
            o.dqkv_bound[q] += error * std::abs(x[k]);
            o.dqkv_bound[k] += error * std::abs(x[q]);
          }
        }
      }
  for (size_t i = 0; i < o.dqkv.size(); ++i) o.dqkv_bound[i] += u * std::abs(o.dqkv[i]);
  return o;
}

inline Floats random_floats(int64_t count, uint32_t seed, float size = 1.0f) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.0f, size);
  Floats x(static_cast<size_t>(count));
  for (float& v : x) v = normal(rng);
  return x;
}
inline Doubles doubles(const Floats& x) {
  return {x.begin(), x.end()};
}

/// Largest |got - want| over 1 + |want|; infinite when got is not a number.
inline double worst(const Floats& got, const Doubles& want) {
  double w = got.size() == want.size() ? 0 : std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < std::min(got.size(), want.size()); ++i) {
    const double e = std::abs(got[i] - want[i]) / (1 + std::abs(want[i]));
    w = e <= w ? w : (std::isnan(e) ? std::numeric_limits<double>::infinity() : e);
  }
  return w;
}
inline bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}
}  // namespace attention
