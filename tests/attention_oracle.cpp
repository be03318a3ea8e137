#include "tests/attention_oracle.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

namespace attention {
Oracle oracle(const Case& c, const Doubles& x, const Doubles& dout, double slack, const Stored* stored) {
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

Floats random_floats(int64_t count, uint32_t seed, float size) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.0f, size);
  Floats x(static_cast<size_t>(count));
  for (float& v : x) v = normal(rng);
  return x;
}

double worst(const Floats& got, const Doubles& want) {
  double w = got.size() == want.size() ? 0 : std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < std::min(got.size(), want.size()); ++i) {
    const double e = std::abs(got[i] - want[i]) / (1 + std::abs(want[i]));
    w = e <= w ? w : (std::isnan(e) ? std::numeric_limits<double>::infinity() : e);
  }
  return w;
}
}  // namespace attention
