// Cases of hyperball: its oracle goes to the new weight by the definition.
#pragma once

#include "optim/hyperball.h"
#include "tests/cases/op_case.h"

/// `count` weights of n elements, after their first step or in it. `moves`: the weights, else the directions
/// are replaced.
inline OpCase hyperball_case(int64_t count, int64_t n, bool first, bool moves) {
  constexpr double kLr = 0.125;
  return {.name = case_name("hyperball", {{"count", count}, {"n", n}}) + (first ? ",first" : "") +
                  (moves ? ",into" : ""),
          .operands = {{.name = "w", .shape = {count, n}, .output = moves},
                       {.name = "u", .shape = {count, n}, .output = !moves},
                       {.name = "radius", .shape = {count}, .output = true}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                std::vector<Hyperball> list;
                for (int64_t i = 0; i < count; ++i) {
                  const Tensor w = t.at("w")[i];
                  list.push_back({.u = t.at("u")[i],
                                  .w = w,
                                  .radius = t.at("radius").slice(i, 1),
                                  .lr = kLr,
                                  .first = first,
                                  .into = moves ? ApplyTo{.w = w, .step = kLr} : ApplyTo{}});
                }
                hyperball(ctx, list);
              },
          .oracle =
              [=](Values& v) {
                for (int64_t k = 0; k < count; ++k) {
                  double *w = &v["w"][k * n], *u = &v["u"][k * n], &radius = v["radius"][k];
                  const auto length = [&](const std::vector<double>& x) {
                    return std::sqrt(sum_of_products(x, x));
                  };
                  if (first) radius = length({w, w + n});
                  const double size = length({u, u + n});
                  std::vector<double> y;
                  for (int64_t i = 0; i < n; ++i) y.push_back(w[i] - kLr * radius * u[i] / size);
                  const double scale = radius / length(y);
                  for (int64_t i = 0; i < n; ++i) {
                    const double next = scale * y[i];
                    u[i] = (w[i] - next) / kLr;
                    w[i] = moves ? next : w[i];
                  }
                }
              },
          .tolerance = 2e-6,
          .bytes = 20.0 * count * n,
          .prepare =
              [=](Values& v) {  // as earlier steps leave it, if not quite
                for (int64_t k = 0; k < count; ++k) {
                  double sum = 0;
                  for (int64_t i = 0; i < n; ++i) sum += v["w"][k * n + i] * v["w"][k * n + i];
                  v["radius"][k] = static_cast<float>(0.75 * std::sqrt(sum));
                }
              },
          .scratch_bytes =
              [=](const Context& ctx) {
                return hyperball_scratch_bytes(ctx, std::vector<int64_t>(static_cast<size_t>(count), n));
              }};
}
