// The one table of operation cases: shapes, inputs, how to run, what must come out, and how much work it is.
// Read by test_ops.cpp (values and gradients) and dev/bench_ops.cpp (speed). To cover a new operation, write
// one function that makes a case of given sizes, and list sizes in test_cases() and training_cases() at the
// end.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "model/kernels/bias.h"
#include "model/kernels/cross_entropy.h"
#include "model/kernels/embedding.h"
#include "model/kernels/gelu.h"
#include "model/kernels/layernorm.h"
#include "model/kernels/matmul.h"
#include "model/kernels/reduce.h"

/// One tensor of a case. Every tensor starts with random values, outputs included, so that it shows when an
/// operation reads what it must not, or leaves something unwritten.
struct Operand {
  std::string name;
  Shape shape;
  bool output = false;       // compared with the oracle afterwards
  double scale = 1;          // standard deviation of the random values
  double offset = 0;         // mean of the random values
  int64_t below = 0;         // > 0: int32 in [0, below) instead of floats
  std::string same_as = "";  // shares the memory of this operand: an aliasing that the header allows
};

using Tensors = std::map<std::string, Tensor>;              // what the operation sees
using Values = std::map<std::string, std::vector<double>>;  // the same in float64, for the oracle

struct OpCase {
  std::string name;               // "matmul/M=7,N=33,K=65,TN": a filter that reruns this case
  std::vector<Operand> operands;  //
  std::function<void(Context&, const Tensors&)> run;
  std::function<void(Values&)> oracle;        // overwrites the outputs; the dumbest possible loops
  double tolerance;                           // |got - want| <= tolerance (|want| + rms(want))
  double flops = 0;                           // per run, when arithmetic is the limit
  double bytes = 0;                           // per run, when memory is: what must be read and written
  std::function<void(Values&)> prepare = {};  // computes inputs that depend on other inputs
  std::function<int64_t(const Context&)> scratch_bytes = {};
  // For gradients: the output `first` must be the derivative of `loss` with respect to the input `second`.
  std::function<double(const Values&)> loss = {};
  std::vector<std::pair<std::string, std::string>> gradients = {};
};

/// "op/B=1,T=2,C=3"
inline std::string case_name(std::string op, std::initializer_list<std::pair<const char*, int64_t>> sizes) {
  const char* separator = "/";
  for (const auto& [key, size] : sizes) {
    op += std::string(separator) + key + "=" + std::to_string(size);
    separator = ",";
  }
  return op;
}

inline double sum_of_products(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// ---------------------------------------------------------------------------------------------------- gelu

inline double gelu_of(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

inline OpCase gelu_forward_case(int64_t B, int64_t T, int64_t C) {
  const Shape shape{B, T, C};
  return {
      .name = case_name("gelu_forward", {{"B", B}, {"T", T}, {"C", C}}),
      .operands = {{.name = "y", .shape = shape, .output = true}, {.name = "x", .shape = shape, .scale = 2}},
      .run = [](Context& ctx, const Tensors& t) { gelu_forward(ctx, {.y = t.at("y"), .x = t.at("x")}); },
      .oracle =
          [](Values& v) {
            for (size_t i = 0; i < v["x"].size(); ++i) v["y"][i] = gelu_of(v["x"][i]);
          },
      .tolerance = 1e-6,
      .bytes = 8.0 * shape.size()};
}

inline OpCase gelu_backward_case(int64_t B, int64_t T, int64_t C, bool in_place) {
  const Shape shape{B, T, C};
  return {.name = case_name("gelu_backward", {{"B", B}, {"T", T}, {"C", C}}) + (in_place ? ",in_place" : ""),
          .operands = {{.name = "dy", .shape = shape},
                       {.name = "dx", .shape = shape, .output = true, .same_as = in_place ? "dy" : ""},
                       {.name = "x", .shape = shape, .scale = 2}},
          .run =
              [](Context& ctx, const Tensors& t) {
                gelu_backward(ctx, {.dx = t.at("dx"), .dy = t.at("dy"), .x = t.at("x")});
              },
          .oracle =
              [](Values& v) {
                const double k = std::sqrt(2 / M_PI);
                for (size_t i = 0; i < v["x"].size(); ++i) {
                  const double x = v["x"][i], th = std::tanh(k * (x + 0.044715 * x * x * x));
                  const double du = k * (1 + 3 * 0.044715 * x * x);
                  v["dx"][i] = v["dy"][i] * (0.5 * (1 + th) + 0.5 * x * (1 - th * th) * du);
                }
              },
          .tolerance = 2e-6,
          .bytes = 12.0 * shape.size(),
          .loss =
              [](const Values& v) {
                std::vector<double> y = v.at("x");
                for (double& value : y) value = gelu_of(value);
                return sum_of_products(v.at("dy"), y);
              },
          .gradients = {{"dx", "x"}}};
}

// ------------------------------------------------------------------------------------------------ layernorm

/// mean, rstd (rows) and y (rows, C) from x, gain and bias.
inline void layernorm_oracle(Values& v) {
  const auto &x = v["x"], &gain = v["gain"], &bias = v["bias"];
  const size_t C = gain.size();
  for (size_t r = 0; r < x.size() / C; ++r) {
    double mean = 0, variance = 0;
    for (size_t c = 0; c < C; ++c) mean += x[r * C + c] / C;
    for (size_t c = 0; c < C; ++c) variance += (x[r * C + c] - mean) * (x[r * C + c] - mean) / C;
    v["mean"][r] = mean;
    v["rstd"][r] = 1 / std::sqrt(variance + 1e-5);
    for (size_t c = 0; c < C; ++c)
      v["y"][r * C + c] = (x[r * C + c] - mean) * v["rstd"][r] * gain[c] + bias[c];
  }
}

enum class Residual { none, separate, in_place };

inline OpCase layernorm_forward_case(int64_t B, int64_t T, int64_t C, Residual fused, double offset = 0) {
  const Shape shape{B, T, C}, rows{B, T};
  const bool add = fused != Residual::none, in_place = fused == Residual::in_place;
  OpCase made{.name = case_name("layernorm_forward", {{"B", B}, {"T", T}, {"C", C}}),
              .operands = {{.name = "residual", .shape = shape, .offset = offset},
                           {.name = "delta", .shape = shape},
                           {.name = "x",
                            .shape = shape,
                            .output = add,
                            .offset = offset,
                            .same_as = in_place ? "residual" : ""},
                           {.name = "y", .shape = shape, .output = true},
                           {.name = "mean", .shape = rows, .output = true},
                           {.name = "rstd", .shape = rows, .output = true},
                           {.name = "gain", .shape = {C}, .offset = 1},
                           {.name = "bias", .shape = {C}}},
              .run =
                  [=](Context& ctx, const Tensors& t) {
                    layernorm_forward(ctx, {.y = t.at("y"),
                                            .mean = t.at("mean"),
                                            .rstd = t.at("rstd"),
                                            .x = t.at("x"),
                                            .gain = t.at("gain"),
                                            .bias = t.at("bias"),
                                            .residual = add ? t.at("residual") : Tensor{},
                                            .delta = add ? t.at("delta") : Tensor{}});
                  },
              .oracle =
                  [=](Values& v) {
                    for (size_t i = 0; add && i < v["x"].size(); ++i)
                      v["x"][i] = v["residual"][i] + v["delta"][i];
                    layernorm_oracle(v);
                  },
              // An offset takes its digits from the deviations.
              .tolerance = 4e-6 * (1 + std::abs(offset)),
              .bytes = (add ? 16.0 : 8.0) * shape.size()};
  if (add) made.name += in_place ? ",fused,in_place" : ",fused";
  if (offset != 0) made.name += ",offset=" + std::to_string(static_cast<int>(offset));
  return made;
}

enum class Into { fresh, dy, dresidual };  // whose memory dx takes

inline OpCase layernorm_backward_case(int64_t B, int64_t T, int64_t C, bool with_residual, bool accumulate,
                                      Into into = Into::fresh) {
  const Shape shape{B, T, C}, rows{B, T};
  const char* const owners[] = {"", "dy", "dresidual"};
  const std::string owner = owners[static_cast<int>(into)];
  OpCase made{.name = case_name("layernorm_backward", {{"B", B}, {"T", T}, {"C", C}}),
              .operands = {{.name = "dy", .shape = shape},
                           {.name = "dresidual", .shape = shape},
                           {.name = "dx", .shape = shape, .output = true, .same_as = owner},
                           {.name = "dgain", .shape = {C}, .output = true},
                           {.name = "dbias", .shape = {C}, .output = true},
                           {.name = "x", .shape = shape},
                           {.name = "y", .shape = shape},
                           {.name = "mean", .shape = rows},
                           {.name = "rstd", .shape = rows},
                           {.name = "gain", .shape = {C}, .offset = 1},
                           {.name = "bias", .shape = {C}}},
              .run =
                  [=](Context& ctx, const Tensors& t) {
                    layernorm_backward(ctx, {.dx = t.at("dx"),
                                             .dgain = t.at("dgain"),
                                             .dbias = t.at("dbias"),
                                             .dy = t.at("dy"),
                                             .x = t.at("x"),
                                             .mean = t.at("mean"),
                                             .rstd = t.at("rstd"),
                                             .gain = t.at("gain"),
                                             .dresidual = with_residual ? t.at("dresidual") : Tensor{},
                                             .accumulate = accumulate});
                  },
              .oracle =
                  [=](Values& v) {
                    layernorm_oracle(v);
                    auto &dx = v["dx"], &dgain = v["dgain"], &dbias = v["dbias"];
                    const auto dy = v["dy"], dresidual = v["dresidual"];  // copies: dx may share their memory
                    const auto &x = v["x"], &gain = v["gain"];
                    if (!accumulate) dgain.assign(dgain.size(), 0), dbias.assign(dbias.size(), 0);
                    for (int64_t r = 0; r < B * T; ++r) {
                      const double mean = v["mean"][r], rstd = v["rstd"][r];
                      double mean_g = 0, mean_gx = 0;
                      for (int64_t i = r * C; i < (r + 1) * C; ++i) {
                        const double xhat = (x[i] - mean) * rstd, g = gain[i % C] * dy[i];
                        mean_g += g / C;
                        mean_gx += g * xhat / C;
                        dgain[i % C] += dy[i] * xhat;
                        dbias[i % C] += dy[i];
                      }
                      for (int64_t i = r * C; i < (r + 1) * C; ++i) {
                        const double xhat = (x[i] - mean) * rstd;
                        dx[i] = rstd * (gain[i % C] * dy[i] - mean_g - xhat * mean_gx);
                        if (with_residual) dx[i] += dresidual[i];
                      }
                    }
                  },
              .tolerance = 1e-5,
              .bytes = (with_residual ? 16.0 : 12.0) * shape.size(),
              .prepare = layernorm_oracle,
              .scratch_bytes = [=](const Context& ctx) { return layernorm_backward_scratch_bytes(ctx, C); }};
  if (with_residual) made.name += ",residual";
  if (accumulate) made.name += ",accumulate";
  if (into != Into::fresh) made.name += ",into_" + owner;
  if (accumulate) return made;  // the old values are no derivative
  made.loss = [=](const Values& v) {
    Values work = v;
    layernorm_oracle(work);
    const double through = sum_of_products(v.at("dy"), work["y"]);
    return with_residual ? through + sum_of_products(v.at("dresidual"), v.at("x")) : through;
  };
  made.gradients = {{"dx", "x"}, {"dgain", "gain"}, {"dbias", "bias"}};
  return made;
}

// ------------------------------------------------------------------------------------------------ embedding

inline std::vector<double> embedding_of(const Values& v, int64_t T, int64_t C) {
  std::vector<double> y(v.at("tokens").size() * C);
  for (size_t i = 0; i < y.size(); ++i) {
    const auto bt = static_cast<int64_t>(i) / C, c = static_cast<int64_t>(i) % C;
    y[i] = v.at("wte")[static_cast<int64_t>(v.at("tokens")[bt]) * C + c] + v.at("wpe")[bt % T * C + c];
  }
  return y;
}

inline OpCase embedding_forward_case(int64_t B, int64_t T, int64_t C, int64_t V) {
  return {.name = case_name("embedding_forward", {{"B", B}, {"T", T}, {"C", C}, {"V", V}}),
          .operands = {{.name = "y", .shape = {B, T, C}, .output = true},
                       {.name = "tokens", .shape = {B, T}, .below = V},
                       {.name = "wte", .shape = {V, C}},
                       {.name = "wpe", .shape = {T + 3, C}}},
          .run =
              [](Context& ctx, const Tensors& t) {
                embedding_forward(
                    ctx, {.y = t.at("y"), .tokens = t.at("tokens"), .wte = t.at("wte"), .wpe = t.at("wpe")});
              },
          .oracle = [=](Values& v) { v["y"] = embedding_of(v, T, C); },
          .tolerance = 1e-6,
          .bytes = 8.0 * B * T * C + 4.0 * T * C};
}

inline OpCase embedding_backward_case(int64_t B, int64_t T, int64_t C, int64_t V, bool accumulate_wte,
                                      bool accumulate_wpe) {
  OpCase made{.name = case_name("embedding_backward", {{"B", B}, {"T", T}, {"C", C}, {"V", V}}),
              .operands = {{.name = "dwte", .shape = {V, C}, .output = true},
                           {.name = "dwpe", .shape = {T + 3, C}, .output = true},
                           {.name = "dy", .shape = {B, T, C}},
                           {.name = "tokens", .shape = {B, T}, .below = V},
                           {.name = "wte", .shape = {V, C}},
                           {.name = "wpe", .shape = {T + 3, C}}},
              .run =
                  [=](Context& ctx, const Tensors& t) {
                    embedding_backward(ctx, {.dwte = t.at("dwte"),
                                             .dwpe = t.at("dwpe"),
                                             .dy = t.at("dy"),
                                             .tokens = t.at("tokens"),
                                             .accumulate_wte = accumulate_wte,
                                             .accumulate_wpe = accumulate_wpe});
                  },
              .oracle =
                  [=](Values& v) {
                    auto &dwte = v["dwte"], &dwpe = v["dwpe"];
                    if (!accumulate_wte) dwte.assign(dwte.size(), 0);
                    if (!accumulate_wpe) dwpe.assign(dwpe.size(), 0);
                    for (int64_t i = 0; i < B * T * C; ++i) {
                      dwte[static_cast<int64_t>(v["tokens"][i / C]) * C + i % C] += v["dy"][i];
                      dwpe[i / C % T * C + i % C] += v["dy"][i];
                    }
                  },
              .tolerance = 2e-6,
              .bytes = (12.0 * B + 8.0) * T * C + (accumulate_wte ? 0.0 : 4.0 * V * C)};
  if (accumulate_wte) made.name += ",accumulate_wte";
  if (accumulate_wpe) made.name += ",accumulate_wpe";
  if (accumulate_wte || accumulate_wpe) return made;
  made.loss = [=](const Values& v) { return sum_of_products(v.at("dy"), embedding_of(v, T, C)); };
  made.gradients = {{"dwte", "wte"}, {"dwpe", "wpe"}};
  return made;
}

// -------------------------------------------------------------------------------------------- cross_entropy

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

inline OpCase cross_entropy_case(int64_t N, int64_t V, int64_t Vp, bool with_gradient) {
  const float scale = 0.125f;
  OpCase made{.name = case_name("cross_entropy", {{"N", N}, {"V", V}, {"Vp", Vp}}) +
                      (with_gradient ? ",gradient" : ""),
              .operands = {{.name = "losses", .shape = {N}, .output = true},
                           {.name = "logits", .shape = {N, Vp}, .output = true, .scale = 3},
                           {.name = "targets", .shape = {N}, .below = V}},
              .run =
                  [=](Context& ctx, const Tensors& t) {
                    cross_entropy(ctx, {.losses = t.at("losses"),
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

// --------------------------------------------------------------------------------------------- matrix
// products

/// c (M, N) = alpha op(a) op(b) + beta d + bias, matrices at `at` times their size into the values.
inline void matmul_oracle(Values& v, int64_t at, int64_t M, int64_t N, int64_t K, bool ta, bool tb,
                          double alpha, double beta, const std::vector<double>& d) {
  const double *a = &v["a"][at * M * K], *b = &v["b"][at * K * N];
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < K; ++k)
        sum += (ta ? a[k * M + m] : a[m * K + k]) * (tb ? b[n * K + k] : b[k * N + n]);
      double& c = v["c"][(at * M + m) * N + n];
      c = alpha * sum + (beta != 0 ? beta * d[(at * M + m) * N + n] : 0);
      if (!v["bias"].empty()) c += v["bias"][n];
    }
}

struct Orientation {
  bool ta, tb;
  std::string name() const { return std::string(ta ? "T" : "N") + (tb ? "T" : "N"); }
};
inline constexpr Orientation kNN{false, false}, kNT{false, true}, kTN{true, false}, kTT{true, true};

inline OpCase matmul_case(int64_t M, int64_t N, int64_t K, Orientation o, bool bias = false, float alpha = 1,
                          float beta = 0) {
  OpCase made{.name = case_name("matmul", {{"M", M}, {"N", N}, {"K", K}}) + "," + o.name(),
              .operands = {{.name = "c", .shape = {M, N}, .output = true},
                           {.name = "a", .shape = o.ta ? Shape{K, M} : Shape{M, K}},
                           {.name = "b", .shape = o.tb ? Shape{N, K} : Shape{K, N}}},
              .run =
                  [=](Context& ctx, const Tensors& t) {
                    matmul(ctx, {.c = t.at("c"),
                                 .a = t.at("a"),
                                 .b = t.at("b"),
                                 .bias = bias ? t.at("bias") : Tensor{},
                                 .transpose_a = o.ta,
                                 .transpose_b = o.tb,
                                 .alpha = alpha,
                                 .beta = beta});
                  },
              .oracle = [=](Values& v) { matmul_oracle(v, 0, M, N, K, o.ta, o.tb, alpha, beta, v["c"]); },
              .tolerance = 2e-6 * std::sqrt(static_cast<double>(K) + 4),
              .flops = 2.0 * M * N * K};
  if (bias) made.operands.push_back({.name = "bias", .shape = {N}});
  if (bias) made.name += ",bias";
  if (alpha != 1 || beta != 0) made.name += ",scaled";
  return made;
}

enum class Symmetry { none, gram, square };  // any a, b; c = a a^T; c = alpha a a + beta a with a symmetric

inline OpCase batched_matmul_case(int64_t batch, int64_t M, int64_t K, Symmetry symmetry,
                                  Orientation o = kNN) {
  const bool any = symmetry == Symmetry::none, square = symmetry == Symmetry::square;
  const int64_t N = any ? M + 5 : M;
  const float alpha = square ? -0.5f : 1.0f, beta = square ? 1.5f : 0.0f;
  if (symmetry == Symmetry::gram) o = kNT;
  OpCase made{
      .name = case_name("batched_matmul", {{"batch", batch}, {"M", M}, {"N", N}, {"K", K}}) + "," + o.name(),
      .operands = {{.name = "c", .shape = {batch, M, N}, .output = true},
                   {.name = "a", .shape = o.ta ? Shape{batch, K, M} : Shape{batch, M, K}},
                   {.name = "b",
                    .shape = o.tb ? Shape{batch, N, K} : Shape{batch, K, N},
                    .same_as = any ? "" : "a"}},
      .run =
          [=](Context& ctx, const Tensors& t) {
            batched_matmul(ctx, {.c = t.at("c"),
                                 .a = t.at("a"),
                                 .b = t.at("b"),
                                 .addend = square ? t.at("a") : Tensor{},
                                 .transpose_a = o.ta,
                                 .transpose_b = o.tb,
                                 .alpha = alpha,
                                 .beta = beta,
                                 .symmetric = !any});
          },
      .oracle =
          [=](Values& v) {
            for (int64_t i = 0; i < batch; ++i) matmul_oracle(v, i, M, N, K, o.ta, o.tb, alpha, beta, v["a"]);
          },
      .tolerance = 2e-6 * std::sqrt(static_cast<double>(K) + 4),
      .flops = 2.0 * batch * M * N * K};  // of the whole product, so symmetric ones can pass the peak
  if (symmetry == Symmetry::gram) made.name += ",gram";
  if (!square) return made;
  made.name += ",square";
  made.prepare = [=](Values& v) {  // a and b: symmetric
    for (int64_t i = 0; i < batch; ++i)
      for (int64_t r = 0; r < M; ++r)
        for (int64_t c = 0; c < r; ++c) v["a"][(i * M + c) * M + r] = v["a"][(i * M + r) * M + c];
    v["b"] = v["a"];
  };
  return made;
}

/// The backward half of y = x w^T + bias: two products and the sum of the rows.
inline OpCase linear_backward_case(int64_t rows, int64_t in, int64_t out) {
  const auto forward = [=](const Values& v) {
    std::vector<double> y(rows * out);
    for (int64_t i = 0; i < rows * out; ++i) {
      y[i] = v.at("bias")[i % out];
      for (int64_t k = 0; k < in; ++k) y[i] += v.at("x")[i / out * in + k] * v.at("w")[i % out * in + k];
    }
    return y;
  };
  return {.name = case_name("linear_backward", {{"rows", rows}, {"in", in}, {"out", out}}),
          .operands = {{.name = "dx", .shape = {rows, in}, .output = true},
                       {.name = "dw", .shape = {out, in}, .output = true},
                       {.name = "dbias", .shape = {out}, .output = true},
                       {.name = "dy", .shape = {rows, out}},
                       {.name = "x", .shape = {rows, in}},
                       {.name = "w", .shape = {out, in}},
                       {.name = "bias", .shape = {out}}},
          .run =
              [](Context& ctx, const Tensors& t) {
                matmul(ctx, {.c = t.at("dx"), .a = t.at("dy"), .b = t.at("w")});
                matmul(ctx, {.c = t.at("dw"), .a = t.at("dy"), .b = t.at("x"), .transpose_a = true});
                bias_backward(ctx, {.dbias = t.at("dbias"), .dy = t.at("dy")});
              },
          .oracle =
              [=](Values& v) {
                for (const char* name : {"dx", "dw", "dbias"}) v[name].assign(v[name].size(), 0);
                for (int64_t i = 0; i < rows * out; ++i) {
                  v["dbias"][i % out] += v["dy"][i];
                  for (int64_t k = 0; k < in; ++k) {
                    v["dx"][i / out * in + k] += v["dy"][i] * v["w"][i % out * in + k];
                    v["dw"][i % out * in + k] += v["dy"][i] * v["x"][i / out * in + k];
                  }
                }
              },
          .tolerance = 1e-5,
          .flops = 4.0 * rows * in * out,
          .loss = [=](const Values& v) { return sum_of_products(v.at("dy"), forward(v)); },
          .gradients = {{"dx", "x"}, {"dw", "w"}, {"dbias", "bias"}}};
}

inline OpCase bias_backward_case(int64_t rows, int64_t N, bool accumulate) {
  return {.name = case_name("bias_backward", {{"rows", rows}, {"N", N}}) + (accumulate ? ",accumulate" : ""),
          .operands = {{.name = "dbias", .shape = {N}, .output = true}, {.name = "dy", .shape = {rows, N}}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                bias_backward(ctx, {.dbias = t.at("dbias"), .dy = t.at("dy"), .accumulate = accumulate});
              },
          .oracle =
              [=](Values& v) {
                if (!accumulate) v["dbias"].assign(N, 0);
                for (int64_t i = 0; i < rows * N; ++i) v["dbias"][i % N] += v["dy"][i];
              },
          .tolerance = 5e-6,
          .bytes = 4.0 * rows * N};
}

// --------------------------------------------------------------------------------------------------- reduce

/// A function of whole tensors to one number.
inline OpCase whole_tensor_case(const std::string& op, int64_t n) {
  return {
      .name = case_name(op, {{"n", n}}),
      .operands = {{.name = "result", .shape = {1}, .output = true},
                   {.name = "a", .shape = {n}},
                   {.name = "b", .shape = {n}, .offset = 0.5}},
      .run =
          [=](Context& ctx, const Tensors& t) {
            *t.at("result").f32() = static_cast<float>(op == "dot"       ? dot(ctx, t.at("a"), t.at("b"))
                                                       : op == "max_abs" ? max_abs(ctx, t.at("a"))
                                                                         : sum_of_squares(ctx, t.at("a")));
          },
      .oracle =
          [=](Values& v) {
            double largest = 0;
            for (double a : v["a"]) largest = std::max(largest, std::abs(a));
            v["result"][0] = op == "max_abs" ? largest : sum_of_products(v["a"], v[op == "dot" ? "b" : "a"]);
          },
      .tolerance = 1e-6,
      .bytes = (op == "dot" ? 8.0 : 4.0) * n};
}

inline OpCase norms_case(bool of_rows, int64_t rows, int64_t cols) {
  return {.name = case_name(of_rows ? "row_norms" : "col_norms", {{"rows", rows}, {"cols", cols}}),
          .operands = {{.name = "norms", .shape = {of_rows ? rows : cols}, .output = true},
                       {.name = "x", .shape = {rows, cols}}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                if (of_rows) return row_norms(ctx, {.norms = t.at("norms"), .x = t.at("x")});
                col_norms(ctx, {.norms = t.at("norms"), .x = t.at("x")});
              },
          .oracle =
              [=](Values& v) {
                v["norms"].assign(of_rows ? rows : cols, 0);
                for (int64_t i = 0; i < rows * cols; ++i)
                  v["norms"][of_rows ? i / cols : i % cols] += v["x"][i] * v["x"][i];
                for (double& norm : v["norms"]) norm = std::sqrt(norm);
              },
          .tolerance = 1e-6,
          .bytes = 4.0 * rows * cols,
          .scratch_bytes = [=](const Context&) { return of_rows ? 0 : col_norms_scratch_bytes(cols); }};
}

inline OpCase scale_case(bool by_rows, int64_t rows, int64_t cols, bool divide, bool in_place) {
  OpCase made{
      .name = case_name(by_rows ? "scale_rows" : "scale_cols", {{"rows", rows}, {"cols", cols}}),
      .operands = {{.name = "x", .shape = {rows, cols}},
                   {.name = "y", .shape = {rows, cols}, .output = true, .same_as = in_place ? "x" : ""},
                   {.name = "scales", .shape = {by_rows ? rows : cols}, .scale = 0.2, .offset = 1}},
      .run =
          [=](Context& ctx, const Tensors& t) {
            if (by_rows)
              return scale_rows(
                  ctx,
                  {.y = t.at("y"), .x = t.at("x"), .scales = t.at("scales"), .factor = 3, .divide = divide});
            scale_cols(
                ctx,
                {.y = t.at("y"), .x = t.at("x"), .scales = t.at("scales"), .factor = 3, .divide = divide});
          },
      .oracle =
          [=](Values& v) {
            for (int64_t i = 0; i < rows * cols; ++i) {
              const double scale = v["scales"][by_rows ? i / cols : i % cols];
              v["y"][i] = 3 * (divide ? (scale == 0 ? 0 : v["x"][i] / scale) : v["x"][i] * scale);
            }
          },
      .tolerance = 1e-6,
      .bytes = 8.0 * rows * cols,
      .prepare = [](Values& v) { v["scales"].back() = 0; }};
  if (divide) made.name += ",divide";
  if (in_place) made.name += ",in_place";
  return made;
}

// ------------------------------------------------------------------------------------------------ the table

/// Sizes for tests: one of everything, nothing a multiple of a vector, and some that every thread takes part
/// in.
inline std::vector<OpCase> test_cases() {
  std::vector<OpCase> cases;
  const auto add = [&](OpCase made) { cases.push_back(std::move(made)); };
  for (const auto& [B, T, C] :
       {std::array<int64_t, 3>{1, 1, 1}, {2, 1, 7}, {1, 3, 16}, {3, 5, 33}, {2, 41, 259}}) {
    add(gelu_forward_case(B, T, C));
    add(gelu_backward_case(B, T, C, false));
    add(gelu_backward_case(B, T, C, true));
    for (Residual fused : {Residual::none, Residual::separate, Residual::in_place})
      add(layernorm_forward_case(B, T, C, fused));
    if (C > 1)
      add(layernorm_backward_case(B, T, C, false, false));  // C = 1: exactly 0, nothing to be relative to
    add(layernorm_backward_case(B, T, C, true, false, Into::dresidual));
    add(layernorm_backward_case(B, T, C, true, true, Into::dy));
    add(embedding_forward_case(B, T, C, 13));
    add(embedding_backward_case(B, T, C, 13, false, false));
    add(embedding_backward_case(B, T, C, 13, true, false));
    add(embedding_backward_case(B, T, C, 13, true, true));
  }
  add(layernorm_forward_case(2, 3, 100, Residual::none, 1000));
  for (const auto& [N, V, Vp] :
       {std::array<int64_t, 3>{1, 1, 1}, {1, 257, 384}, {5, 33, 33}, {9, 1025, 1152}, {3, 5001, 5120}})
    for (bool gradient : {false, true}) add(cross_entropy_case(N, V, Vp, gradient));
  for (Orientation o : {kNN, kNT, kTN, kTT}) {
    add(matmul_case(1, 1, 1, o));
    add(matmul_case(7, 33, 65, o, true));
    add(matmul_case(7, 33, 65, o, false, -0.5f, 2));
    add(matmul_case(130, 67, 129, o, true, 2, 0.5f));
    add(batched_matmul_case(3, 9, 17, Symmetry::none, o));
  }
  add(matmul_case(1, 50, 40, kNT, true));
  for (int64_t M : {1, 7, 65, 200, 300}) {
    add(batched_matmul_case(3, M, M + 11, Symmetry::gram));
    add(batched_matmul_case(2, M, M, Symmetry::square));
  }
  add(batched_matmul_case(1, 300, 70, Symmetry::gram));
  add(batched_matmul_case(1, 700, 20, Symmetry::gram));
  for (Orientation o : {kNN, kNT, kTN})  // large enough to be cut among threads
    for (float beta : {0.0f, 2.0f}) add(matmul_case(300, 280, 31, o, true, 1, beta));
  for (const auto& [rows, in, out] : {std::array<int64_t, 3>{1, 1, 1}, {1, 7, 5}, {9, 17, 33}})
    add(linear_backward_case(rows, in, out));
  for (const auto& [rows, cols] :
       {std::pair<int64_t, int64_t>{1, 1}, {1, 33}, {7, 1}, {31, 100}, {130, 259}}) {
    for (bool accumulate : {false, true}) add(bias_backward_case(rows, cols, accumulate));
    for (bool by_rows : {true, false}) {
      add(norms_case(by_rows, rows, cols));
      for (bool divide : {true, false}) add(scale_case(by_rows, rows, cols, divide, divide));
    }
  }
  for (const char* op : {"sum_of_squares", "dot", "max_abs"})
    for (int64_t n : {1, 15, 1025, 300000}) add(whole_tensor_case(op, n));
  return cases;
}

/// Sizes of training GPT-2 124M at 4 x 256 tokens, vocabulary in chunks of 256 rows; and of its
/// Newton-Schulz.
inline std::vector<OpCase> training_cases() {
  const int64_t B = 4, T = 256, C = 768, BT = B * T, V = 50257, Vp = 50304, chunk = 256;
  std::vector<OpCase> cases{embedding_forward_case(B, T, C, Vp),
                            embedding_backward_case(B, T, C, Vp, true, false),
                            layernorm_forward_case(B, T, C, Residual::none),
                            layernorm_forward_case(B, T, C, Residual::separate),
                            layernorm_backward_case(B, T, C, true, false, Into::dresidual),
                            gelu_forward_case(B, T, 4 * C),
                            gelu_backward_case(B, T, 4 * C, true),
                            bias_backward_case(BT, C, false),
                            bias_backward_case(BT, 4 * C, false),
                            cross_entropy_case(chunk, V, Vp, false),
                            cross_entropy_case(chunk, V, Vp, true),
                            cross_entropy_case(BT, 257, 384, true),
                            whole_tensor_case("sum_of_squares", Vp * C),
                            whole_tensor_case("dot", 4 * C * C),
                            whole_tensor_case("max_abs", 4 * C * C),
                            norms_case(true, Vp, C),
                            norms_case(false, 4 * C, C),
                            scale_case(true, Vp, C, true, true),
                            scale_case(false, 4 * C, C, true, true)};
  for (const auto& [out, in] : {std::pair<int64_t, int64_t>{3 * C, C}, {C, C}, {4 * C, C}, {C, 4 * C}}) {
    cases.push_back(matmul_case(BT, out, in, kNT, true));  // forward
    cases.push_back(matmul_case(BT, in, out, kNN));        // input gradient
    cases.push_back(matmul_case(out, in, BT, kTN));        // weight gradient
  }
  cases.push_back(matmul_case(chunk, Vp, C, kNT));  // the head, a chunk of rows
  cases.push_back(matmul_case(chunk, C, Vp, kNN));
  cases.push_back(matmul_case(Vp, C, chunk, kTN, false, 1, 1));
  for (const auto& [batch, M, K] : {std::array<int64_t, 3>{12, 768, 768}, {12, 768, 3072}, {6, 384, 384}}) {
    cases.push_back(batched_matmul_case(batch, M, K, Symmetry::gram));
    if (K == M) cases.push_back(batched_matmul_case(batch, M, M, Symmetry::square));
  }
  return cases;
}
