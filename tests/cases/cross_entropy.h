// Cases: Softmax cross-entropy over padded rows.
#pragma once

#include "model/kernels/cross_entropy.h"
#include "tests/cases/op_case.h"

inline double log_sum_exp_of(const double* x, int64_t V) {
  double m = x[0], sum = 0;
  for (int64_t i = 1; i < V; ++i) m = std::max(m, x[i]);
  for (int64_t i = 0; i < V; ++i) sum += std::exp(x[i] - m);
  return m + std::log(sum);
}

inline std::vector<double> cross_entropy_of(const Values& v, int64_t V) {
  const int64_t N = v.at("targets").size(), Vp = v.at("logits").size() / N;
  std::vector<double> losses(N);
  for (int64_t n = 0; n < N; ++n) {
    const double* row = &v.at("logits")[n * Vp];
    losses[n] = log_sum_exp_of(row, V) - row[static_cast<int64_t>(v.at("targets")[n])];
  }
  return losses;
}

inline OpCase cross_entropy_case(int64_t N, int64_t V, int64_t Vp, bool with_gradient,
                                 Op<CrossEntropy> op = cross_entropy) {
  const float scale = 0.125f;
  OpCase made{.name = case_name("cross_entropy", {{"N", N}, {"V", V}, {"Vp", Vp}}) +
                      (with_gradient ? ",gradient" : ""),
              .operands = {{.name = "losses", .shape = {N}, .output = true},
                           {.name = "logits", .shape = {N, Vp}, .output = true, .scale = 3, .half = true},
                           {.name = "targets", .shape = {N}, .below = V}},
              .run =
                  [=](Context& ctx, const Tensors& t) {
                    op(ctx, {.losses = t.at("losses"),
                             .logits = t.at("logits"),
                             .targets = t.at("targets"),
                             .V = V,
                             .grad_scale = scale,
                             .with_gradient = with_gradient});
                  },
              .oracle =
                  [=](Values& v) {
                    v["losses"] = cross_entropy_of(v, V);
                    for (int64_t n = 0; with_gradient && n < N; ++n) {
                      double* row = &v["logits"][n * Vp];
                      const double total = log_sum_exp_of(row, V);
                      for (int64_t i = 0; i < Vp; ++i)
                        row[i] = i < V ? scale * std::exp(row[i] - total) : 0.0;
                      row[static_cast<int64_t>(v["targets"][n])] -= scale;
                    }
                  },
              .tolerance = 1e-6,
              .bytes = (with_gradient ? 8.0 : 4.0) * N * Vp};
  if (!with_gradient) return made;
  made.loss = [=](const Values& v) {
    double sum = 0;
    for (double loss : cross_entropy_of(v, V)) sum += scale * loss;
    return sum;
  };
  made.gradients = {{"logits", "logits"}};
  return made;
}
