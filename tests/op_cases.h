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

#include "model/kernels/attention.h"
#include "model/kernels/bias.h"
#include "model/kernels/cast.h"
#include "model/kernels/cross_entropy.h"
#include "model/kernels/embedding.h"
#include "model/kernels/gelu.h"
#include "model/kernels/layernorm.h"
#include "model/kernels/matmul.h"
#include "model/kernels/reduce.h"
#include "optim/update.h"
#include "tests/attention_oracle.h"

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
  bool half = false;         // an activation, or a weight that products read: bf16 when the context says so
};

using Tensors = std::map<std::string, Tensor>;              // what the operation sees
using Values = std::map<std::string, std::vector<double>>;  // the same in float64, for the oracle

/// An operation: a door, or a candidate under the same signature that is to be compared with it.
template <typename Args>
using Op = void (*)(Context&, const Args&);

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
  double half_tolerance = 1.0 / 256;  // what storing `half` operands as bf16 adds to the tolerance
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

inline double gelu_slope_of(double x) {
  const double k = std::sqrt(2 / M_PI), th = std::tanh(k * (x + 0.044715 * x * x * x));
  return 0.5 * (1 + th) + 0.5 * x * (1 - th * th) * k * (1 + 3 * 0.044715 * x * x);
}

inline OpCase gelu_forward_case(int64_t B, int64_t T, int64_t C, Op<GeluForward> op = gelu_forward) {
  const Shape shape{B, T, C};
  return {.name = case_name("gelu_forward", {{"B", B}, {"T", T}, {"C", C}}),
          .operands = {{.name = "y", .shape = shape, .output = true, .half = true},
                       {.name = "x", .shape = shape, .scale = 2, .half = true}},
          .run = [=](Context& ctx, const Tensors& t) { op(ctx, {.y = t.at("y"), .x = t.at("x")}); },
          .oracle =
              [](Values& v) {
                for (size_t i = 0; i < v["x"].size(); ++i) v["y"][i] = gelu_of(v["x"][i]);
              },
          .tolerance = 1e-6,
          .bytes = 8.0 * shape.size()};
}

inline OpCase gelu_backward_case(int64_t B, int64_t T, int64_t C, bool in_place,
                                 Op<GeluBackward> op = gelu_backward) {
  const Shape shape{B, T, C};
  return {.name = case_name("gelu_backward", {{"B", B}, {"T", T}, {"C", C}}) + (in_place ? ",in_place" : ""),
          .operands =
              {{.name = "dy", .shape = shape, .half = true},
               {.name = "dx", .shape = shape, .output = true, .same_as = in_place ? "dy" : "", .half = true},
               {.name = "x", .shape = shape, .scale = 2, .half = true}},
          .run = [=](Context& ctx,
                     const Tensors& t) { op(ctx, {.dx = t.at("dx"), .dy = t.at("dy"), .x = t.at("x")}); },
          .oracle =
              [](Values& v) {
                for (size_t i = 0; i < v["x"].size(); ++i) v["dx"][i] = v["dy"][i] * gelu_slope_of(v["x"][i]);
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
  auto &y = v["y"], &rstds = v["rstd"], &means = v["mean"];
  const size_t C = gain.size();
  for (size_t r = 0; r < x.size() / C; ++r) {
    double mean = 0, variance = 0;
    for (size_t c = 0; c < C; ++c) mean += x[r * C + c] / C;
    for (size_t c = 0; c < C; ++c) variance += (x[r * C + c] - mean) * (x[r * C + c] - mean) / C;
    means[r] = mean;
    rstds[r] = 1 / std::sqrt(variance + 1e-5);
    for (size_t c = 0; c < C; ++c) y[r * C + c] = (x[r * C + c] - mean) * rstds[r] * gain[c] + bias[c];
  }
}

enum class Residual { none, separate, in_place };

inline OpCase layernorm_forward_case(int64_t B, int64_t T, int64_t C, Residual fused, double offset = 0,
                                     Op<LayernormForward> op = layernorm_forward) {
  const Shape shape{B, T, C}, rows{B, T};
  const bool add = fused != Residual::none, in_place = fused == Residual::in_place;
  OpCase made{.name = case_name("layernorm_forward", {{"B", B}, {"T", T}, {"C", C}}),
              .operands = {{.name = "residual", .shape = shape, .offset = offset, .half = true},
                           {.name = "delta", .shape = shape, .half = true},
                           {.name = "x",
                            .shape = shape,
                            .output = add,
                            .offset = offset,
                            .same_as = in_place ? "residual" : "",
                            .half = true},
                           {.name = "y", .shape = shape, .output = true, .half = true},
                           {.name = "mean", .shape = rows, .output = true},
                           {.name = "rstd", .shape = rows, .output = true},
                           {.name = "gain", .shape = {C}, .offset = 1},
                           {.name = "bias", .shape = {C}}},
              .run =
                  [=](Context& ctx, const Tensors& t) {
                    op(ctx, {.y = t.at("y"),
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
  // Sixteenths: sums that bf16 holds exactly. Otherwise rounding x would move y by more than rounding y.
  if (add)
    made.prepare = [](Values& v) {
      for (const char* name : {"residual", "delta"})
        for (double& value : v[name]) value = std::round(16 * value) / 16;
    };
  if (offset != 0) made.name += ",offset=" + std::to_string(static_cast<int>(offset));
  return made;
}

enum class Into { fresh, dy, dresidual };  // whose memory dx takes

inline OpCase layernorm_backward_case(int64_t B, int64_t T, int64_t C, bool with_residual, bool accumulate,
                                      Into into = Into::fresh,
                                      Op<LayernormBackward> op = layernorm_backward) {
  const Shape shape{B, T, C}, rows{B, T};
  const char* const owners[] = {"", "dy", "dresidual"};
  const std::string owner = owners[static_cast<int>(into)];
  OpCase made{.name = case_name("layernorm_backward", {{"B", B}, {"T", T}, {"C", C}}),
              .operands = {{.name = "dy", .shape = shape, .half = true},
                           {.name = "dresidual", .shape = shape, .half = true},
                           {.name = "dx", .shape = shape, .output = true, .same_as = owner, .half = true},
                           {.name = "dgain", .shape = {C}, .output = true},
                           {.name = "dbias", .shape = {C}, .output = true},
                           {.name = "x", .shape = shape, .half = true},
                           {.name = "y", .shape = shape},
                           {.name = "mean", .shape = rows},
                           {.name = "rstd", .shape = rows},
                           {.name = "gain", .shape = {C}, .offset = 1},
                           {.name = "bias", .shape = {C}}},
              .run =
                  [=](Context& ctx, const Tensors& t) {
                    op(ctx, {.dx = t.at("dx"),
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
                  [=](Values& v) {  // mean and rstd are inputs: `prepare` made them
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

inline OpCase embedding_forward_case(int64_t B, int64_t T, int64_t C, int64_t V,
                                     Op<EmbeddingForward> op = embedding_forward) {
  return {.name = case_name("embedding_forward", {{"B", B}, {"T", T}, {"C", C}, {"V", V}}),
          .operands = {{.name = "y", .shape = {B, T, C}, .output = true, .half = true},
                       {.name = "tokens", .shape = {B, T}, .below = V},
                       {.name = "wte", .shape = {V, C}, .half = true},
                       {.name = "wpe", .shape = {T + 3, C}, .half = true}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                op(ctx, {.y = t.at("y"), .tokens = t.at("tokens"), .wte = t.at("wte"), .wpe = t.at("wpe")});
              },
          .oracle = [=](Values& v) { v["y"] = embedding_of(v, T, C); },
          .tolerance = 1e-6,
          .bytes = 8.0 * B * T * C + 4.0 * T * C};
}

inline OpCase embedding_backward_case(int64_t B, int64_t T, int64_t C, int64_t V, bool accumulate_wte,
                                      bool accumulate_wpe, Op<EmbeddingBackward> op = embedding_backward) {
  OpCase made{
      .name = case_name("embedding_backward", {{"B", B}, {"T", T}, {"C", C}, {"V", V}}),
      .operands = {{.name = "dwte", .shape = {V, C}, .output = true},
                   {.name = "dwpe", .shape = {T + 3, C}, .output = true},
                   {.name = "dy", .shape = {B, T, C}, .half = true},
                   {.name = "tokens", .shape = {B, T}, .below = V},
                   {.name = "order", .shape = {B * T}, .below = B * T},
                   {.name = "wte", .shape = {V, C}},
                   {.name = "wpe", .shape = {T + 3, C}}},
      .run =
          [=](Context& ctx, const Tensors& t) {
            op(ctx, {.dwte = t.at("dwte"),
                     .dwpe = t.at("dwpe"),
                     .dy = t.at("dy"),
                     .tokens = t.at("tokens"),
                     .order = t.at("order"),
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
      .bytes = (12.0 * B + 8.0) * T * C + (accumulate_wte ? 0.0 : 4.0 * V * C),
      .prepare =
          [=](Values& v) {
            const std::vector<int32_t> tokens(v["tokens"].begin(), v["tokens"].end());
            std::vector<int32_t> order(tokens.size());
            sort_tokens(tokens, V, order);
            v["order"].assign(order.begin(), order.end());
          },
      .scratch_bytes = [=](const Context& ctx) { return embedding_backward_scratch_bytes(ctx, B * T, C); }};
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
                          float beta = 0, Op<Matmul> op = matmul) {
  OpCase made{.name = case_name("matmul", {{"M", M}, {"N", N}, {"K", K}}) + "," + o.name(),
              .operands = {{.name = "c", .shape = {M, N}, .output = true, .half = true},
                           {.name = "a", .shape = o.ta ? Shape{K, M} : Shape{M, K}, .half = true},
                           {.name = "b", .shape = o.tb ? Shape{N, K} : Shape{K, N}, .half = true}},
              .run =
                  [=](Context& ctx, const Tensors& t) {
                    op(ctx, {.c = t.at("c"),
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
  if (bias) made.operands.push_back({.name = "bias", .shape = {N}, .half = true});
  if (bias) made.name += ",bias";
  if (alpha != 1 || beta != 0) made.name += ",scaled";
  return made;
}

// Through a GELU bf16 values may be rounded twice, which is for test_gpu_matmul.cpp to judge: the operands of
// these two are not marked `half`.
inline void store_as_f32(OpCase& op_case) {
  for (Operand& operand : op_case.operands) operand.half = false;
}

/// The first half of a feed-forward layer: h = x w^T + bias, y = gelu(h).
inline OpCase matmul_gelu_case(int64_t M, int64_t N, int64_t K, bool bias, Op<Matmul> op = matmul) {
  OpCase made = matmul_case(M, N, K, kNT, bias);
  made.name = case_name("matmul", {{"M", M}, {"N", N}, {"K", K}}) + ",NT" + (bias ? ",bias" : "") + ",gelu";
  made.operands.push_back({.name = "h", .shape = {M, N}, .output = true});
  store_as_f32(made);
  for (Operand& operand : made.operands)
    if (operand.name == "b") operand.scale = 1 / std::sqrt(static_cast<double>(K));
  made.run = [=](Context& ctx, const Tensors& t) {
    op(ctx, {.c = t.at("c"),
             .a = t.at("a"),
             .b = t.at("b"),
             .bias = bias ? t.at("bias") : Tensor{},
             .pre_gelu = t.at("h"),
             .transpose_b = true});
  };
  made.oracle = [=](Values& v) {
    matmul_oracle(v, 0, M, N, K, false, true, 1, 0, {});
    v["h"] = v["c"];
    for (double& y : v["c"]) y = gelu_of(y);
  };
  made.tolerance *= 2;  // the slope of gelu reaches 1.13
  return made;
}

/// The input gradient of its second half, through the GELU: dh = (dy w) * gelu'(h).
inline OpCase matmul_dgelu_case(int64_t M, int64_t N, int64_t K, Op<Matmul> op = matmul) {
  OpCase made = matmul_case(M, N, K, kNN);
  made.name += ",dgelu";
  made.operands.push_back({.name = "h", .shape = {M, N}, .scale = 2});
  store_as_f32(made);
  made.run = [=](Context& ctx, const Tensors& t) {
    op(ctx, {.c = t.at("c"), .a = t.at("a"), .b = t.at("b"), .gelu_input = t.at("h")});
  };
  made.oracle = [=](Values& v) {
    matmul_oracle(v, 0, M, N, K, false, false, 1, 0, {});
    auto &c = v["c"], &h = v["h"];
    for (size_t i = 0; i < h.size(); ++i) c[i] *= gelu_slope_of(h[i]);
  };
  made.loss = [=](const Values& v) {  // <dy, gelu(h) w^T>
    double sum = 0;
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < N; ++n)
        for (int64_t k = 0; k < K; ++k)
          sum += v.at("a")[m * K + k] * gelu_of(v.at("h")[m * N + n]) * v.at("b")[k * N + n];
    return sum;
  };
  made.gradients = {{"c", "h"}};
  return made;
}

/// dw = dy^T x in f32 from activations of any type, and with `dbias` the column sums of dy; both are added to
/// what was there when accumulating.
inline OpCase weight_gradient_case(int64_t rows, int64_t out, int64_t in, bool accumulate, bool dbias,
                                   Op<Matmul> op = matmul) {
  OpCase made = matmul_case(out, in, rows, kTN);
  made.name = case_name("matmul", {{"M", out}, {"N", in}, {"K", rows}}) + ",TN,f32";
  if (accumulate) made.name += ",accumulate";
  if (dbias) made.name += ",dbias";
  made.operands[0].half = false;
  if (dbias) made.operands.push_back({.name = "dbias", .shape = {out}, .output = true});
  made.run = [=](Context& ctx, const Tensors& t) {
    op(ctx, {.c = t.at("c"),
             .a = t.at("a"),
             .b = t.at("b"),
             .dbias = dbias ? t.at("dbias") : Tensor{},
             .transpose_a = true,
             .beta = accumulate ? 1.0f : 0.0f});
  };
  made.oracle = [=](Values& v) {
    matmul_oracle(v, 0, out, in, rows, true, false, 1, accumulate ? 1 : 0, v["c"]);
    if (!dbias) return;
    auto &sums = v["dbias"], &dy = v["a"];
    if (!accumulate) sums.assign(out, 0);
    for (int64_t i = 0; i < rows * out; ++i) sums[i % out] += dy[i];
  };
  if (dbias) made.scratch_bytes = [=](const Context& ctx) { return dbias_scratch_bytes(ctx, rows, out); };
  return made;
}

enum class Symmetry { none, gram, square };  // any a, b; c = a a^T; c = alpha a a + beta a with a symmetric

inline OpCase batched_matmul_case(int64_t batch, int64_t M, int64_t K, Symmetry symmetry, Orientation o = kNN,
                                  Op<BatchedMatmul> op = batched_matmul) {
  const bool any = symmetry == Symmetry::none, square = symmetry == Symmetry::square;
  const int64_t N = any ? M + 5 : M;
  const float alpha = square ? -0.5f : 1.0f, beta = square ? 1.5f : 0.0f;
  if (symmetry == Symmetry::gram) o = kNT;
  OpCase made{
      .name = case_name("batched_matmul", {{"batch", batch}, {"M", M}, {"N", N}, {"K", K}}) + "," + o.name(),
      .operands = {{.name = "c", .shape = {batch, M, N}, .output = true, .half = true},
                   {.name = "a", .shape = o.ta ? Shape{batch, K, M} : Shape{batch, M, K}, .half = true},
                   {.name = "b",
                    .shape = o.tb ? Shape{batch, N, K} : Shape{batch, K, N},
                    .same_as = any ? "" : "a",
                    .half = true}},
      .run =
          [=](Context& ctx, const Tensors& t) {
            op(ctx, {.c = t.at("c"),
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
          .operands = {{.name = "dx", .shape = {rows, in}, .output = true, .half = true},
                       {.name = "dw", .shape = {out, in}, .output = true},
                       {.name = "dbias", .shape = {out}, .output = true},
                       {.name = "dy", .shape = {rows, out}, .half = true},
                       {.name = "x", .shape = {rows, in}, .half = true},
                       {.name = "w", .shape = {out, in}, .half = true},
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

inline OpCase bias_backward_case(int64_t rows, int64_t N, bool accumulate,
                                 Op<BiasBackward> op = bias_backward) {
  return {.name = case_name("bias_backward", {{"rows", rows}, {"N", N}}) + (accumulate ? ",accumulate" : ""),
          .operands = {{.name = "dbias", .shape = {N}, .output = true},
                       {.name = "dy", .shape = {rows, N}, .half = true}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                op(ctx, {.dbias = t.at("dbias"), .dy = t.at("dy"), .accumulate = accumulate});
              },
          .oracle =
              [=](Values& v) {
                if (!accumulate) v["dbias"].assign(N, 0);
                for (int64_t i = 0; i < rows * N; ++i) v["dbias"][i % N] += v["dy"][i];
              },
          .tolerance = 5e-6,
          .bytes = 4.0 * rows * N,
          .scratch_bytes = [=](const Context& ctx) { return bias_backward_scratch_bytes(ctx, rows, N); }};
}

// ----------------------------------------------------------------------------------------------------- cast

/// From an operand that is stored as the context says to one that is float32, or the reverse.
inline OpCase cast_case(int64_t rows, int64_t cols, bool to_float) {
  return {.name = case_name("cast", {{"rows", rows}, {"cols", cols}}) + (to_float ? ",to_float" : ""),
          .operands = {{.name = "y", .shape = {rows, cols}, .output = true, .half = !to_float},
                       {.name = "x", .shape = {rows, cols}, .half = to_float}},
          .run = [](Context& ctx, const Tensors& t) { cast(ctx, {.y = t.at("y"), .x = t.at("x")}); },
          .oracle = [](Values& v) { v["y"] = v["x"]; },
          .tolerance = 0,
          .bytes = 8.0 * rows * cols};
}

inline OpCase transpose_case(int64_t batch, int64_t rows, int64_t cols) {
  return {.name = case_name("transpose", {{"batch", batch}, {"rows", rows}, {"cols", cols}}),
          .operands = {{.name = "y", .shape = {batch, cols, rows}, .output = true, .half = true},
                       {.name = "x", .shape = {batch, rows, cols}, .half = true}},
          .run = [](Context& ctx, const Tensors& t) { transpose(ctx, {.y = t.at("y"), .x = t.at("x")}); },
          .oracle =
              [=](Values& v) {
                for (int64_t i = 0; i < batch * rows * cols; ++i) {
                  const int64_t c = i % cols, r = i / cols % rows, matrix = i / cols / rows;
                  v["y"][(matrix * cols + c) * rows + r] = v["x"][i];
                }
              },
          .tolerance = 0,
          .bytes = 8.0 * batch * rows * cols};
}

// --------------------------------------------------------------------------------------------------- reduce

/// A function of whole tensors to one number.
/// Brings a number to an operand.
inline void put_number(Context& ctx, const Tensor& to, double value) {
  OnHost host(ctx, to, /*load=*/false);
  *host->f32() = static_cast<float>(value);
  host.store();
}

inline OpCase whole_tensor_case(const std::string& op, int64_t n) {
  return {.name = case_name(op, {{"n", n}}),
          .operands = {{.name = "result", .shape = {1}, .output = true},
                       {.name = "a", .shape = {n}, .half = true},
                       {.name = "b", .shape = {n}, .offset = 0.5}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                const Tensor a = t.at("a");
                put_number(ctx, t.at("result"),
                           op == "dot"       ? dot(ctx, a, t.at("b"))
                           : op == "sum_abs" ? sum_abs(ctx, a)
                           : op == "max_abs" ? max_abs(ctx, a)
                                             : sum_of_squares(ctx, a));
              },
          .oracle =
              [=](Values& v) {
                double largest = 0, sum = 0;
                for (double a : v["a"]) largest = std::max(largest, std::abs(a)), sum += std::abs(a);
                v["result"][0] = op == "max_abs"   ? largest
                                 : op == "sum_abs" ? sum
                                                   : sum_of_products(v["a"], v[op == "dot" ? "b" : "a"]);
              },
          .tolerance = 1e-6,
          .bytes = (op == "dot" ? 8.0 : 4.0) * n,
          .scratch_bytes = [](const Context&) { return whole_scratch_bytes(); }};
}

/// `count` pieces of one tensor, one after the other: of n elements each where that is a multiple of 64, as
/// in training, else of n, n + 1, n + 2, n, ..., so that most begin anywhere.
struct Pieces {
  int64_t count, n;
  int64_t more(int64_t i) const { return n % 64 == 0 ? 0 : i % 3; }
  int64_t size(int64_t i) const { return n + more(i); }
  int64_t start(int64_t i) const { return i * n + (n % 64 == 0 ? 0 : i / 3 * 3 + i % 3 / 2); }
  int64_t total() const { return start(count); }
  Tensor of(const Tensor& all, int64_t i) const { return all.slice(start(i), size(i)); }
};

/// Results in float64 stay where ctx computes; the case gets them rounded.
inline OpCase sums_of_squares_case(int64_t count, int64_t n) {
  const Pieces pieces{count, n};
  const auto tensors = [=](const Tensor& x) {
    std::vector<Tensor> list;
    for (int64_t i = 0; i < count; ++i) list.push_back(pieces.of(x, i));
    return list;
  };
  return {.name = case_name("sums_of_squares", {{"count", count}, {"n", n}}),
          .operands = {{.name = "x", .shape = {pieces.total()}},
                       {.name = "sums", .shape = {count}, .output = true}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                Arena arena("sums");
                Tensor sums;
                arena.add(&sums, DType::f64, {count});
                arena.allocate(ctx);
                sums_of_squares(ctx, {.sums = sums, .tensors = tensors(t.at("x"))});
                const OnHost from(ctx, sums);
                OnHost to(ctx, t.at("sums"), /*load=*/false);
                for (int64_t i = 0; i < count; ++i) to->f32()[i] = static_cast<float>(from->f64()[i]);
                to.store();
              },
          .oracle =
              [=](Values& v) {
                for (int64_t i = 0; i < count; ++i) {
                  double sum = 0;
                  for (int64_t k = pieces.start(i); k < pieces.start(i + 1); ++k)
                    sum += v["x"][k] * v["x"][k];
                  v["sums"][i] = sum;
                }
              },
          .tolerance = 1e-6,
          .bytes = 4.0 * pieces.total(),
          .scratch_bytes =
              [=](const Context&) {
                std::vector<Tensor> shapes;
                for (int64_t i = 0; i < count; ++i)
                  shapes.emplace_back(nullptr, DType::f32, Shape{pieces.size(i)});
                return sums_of_squares_scratch_bytes(shapes);
              }};
}

inline OpCase mean_case(int64_t n, bool accumulate) {
  return {
      .name = case_name("mean", {{"n", n}}) + (accumulate ? ",accumulate" : ""),
      .operands = {{.name = "x", .shape = {n}, .offset = 1}, {.name = "out", .shape = {1}, .output = true}},
      .run =
          [=](Context& ctx, const Tensors& t) {
            Arena arena("mean");
            Tensor out;
            arena.add(&out, DType::f64, {1});
            arena.allocate(ctx);  // zeros
            const Mean args{.out = out, .x = t.at("x"), .scale = 0.5, .accumulate = accumulate};
            mean(ctx, args);
            mean(ctx, args);  // the same again, or twice as much
            put_number(ctx, t.at("out"), *OnHost(ctx, out)->f64());
          },
      .oracle =
          [=](Values& v) {
            double sum = 0;
            for (double x : v["x"]) sum += x;
            v["out"][0] = (accumulate ? 2 : 1) * 0.5 * sum / static_cast<double>(n);
          },
      .tolerance = 1e-6,
      .bytes = 4.0 * n};
}

inline OpCase norms_case(bool of_rows, int64_t rows, int64_t cols) {
  return {.name = case_name(of_rows ? "row_norms" : "col_norms", {{"rows", rows}, {"cols", cols}}),
          .operands = {{.name = "norms", .shape = {of_rows ? rows : cols}, .output = true},
                       {.name = "x", .shape = {rows, cols}, .half = true}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                if (of_rows) return row_norms(ctx, {.norms = t.at("norms"), .x = t.at("x")});
                col_norms(ctx, {.norms = t.at("norms"), .x = t.at("x")});
              },
          .oracle =
              [=](Values& v) {
                auto &norms = v["norms"], &x = v["x"];
                norms.assign(of_rows ? rows : cols, 0);
                for (int64_t i = 0; i < rows * cols; ++i) norms[of_rows ? i / cols : i % cols] += x[i] * x[i];
                for (double& norm : norms) norm = std::sqrt(norm);
              },
          .tolerance = 1e-6,
          .bytes = 4.0 * rows * cols,
          .scratch_bytes =
              [=](const Context&) {
                return of_rows ? row_norms_scratch_bytes(rows, cols) : col_norms_scratch_bytes(rows, cols);
              }};
}

inline OpCase scale_case(bool by_rows, int64_t rows, int64_t cols, bool divide, bool in_place) {
  OpCase made{
      .name = case_name(by_rows ? "scale_rows" : "scale_cols", {{"rows", rows}, {"cols", cols}}),
      .operands =
          {{.name = "x", .shape = {rows, cols}, .half = true},
           {.name = "y", .shape = {rows, cols}, .output = true, .same_as = in_place ? "x" : "", .half = true},
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
            auto &y = v["y"], &x = v["x"], &scales = v["scales"];
            for (int64_t i = 0; i < rows * cols; ++i) {
              const double scale = scales[by_rows ? i / cols : i % cols];
              y[i] = 3 * (divide ? (scale == 0 ? 0 : x[i] / scale) : x[i] * scale);
            }
          },
      .tolerance = 1e-6,
      .bytes = 8.0 * rows * cols,
      .prepare = [](Values& v) { v["scales"].back() = 0; }};
  if (divide) made.name += ",divide";
  if (in_place) made.name += ",in_place";
  return made;
}

// ------------------------------------------------------------------------------------------------ optimizer

/// Which of its tensors smooth() finds in bf16 on a GPU that computes in it.
enum class HalfSmooth { none, u, g };

inline OpCase smooth_case(int64_t count, int64_t n, bool remember, bool nesterov, HalfSmooth half) {
  const Pieces pieces{count, n};
  const Shape all{pieces.total()};
  const bool in_place = half == HalfSmooth::none;
  const auto beta = [](int64_t i) { return 0.9f - 0.01f * static_cast<float>(i % 7); };
  OpCase made{.name = case_name("smooth", {{"count", count}, {"n", n}}),
              .operands = {{.name = "g", .shape = all, .half = half == HalfSmooth::g},
                           {.name = "u",
                            .shape = all,
                            .output = true,
                            .same_as = in_place ? "g" : "",
                            .half = half == HalfSmooth::u},
                           {.name = "m", .shape = all, .output = true},
                           {.name = "scale", .shape = {1}}},
              .run =
                  [=](Context& ctx, const Tensors& t) {
                    std::vector<Smooth> list;
                    for (int64_t i = 0; i < count; ++i)
                      list.push_back({.u = pieces.of(t.at("u"), i),
                                      .m = remember ? pieces.of(t.at("m"), i) : Tensor{},
                                      .g = pieces.of(t.at("g"), i),
                                      .beta = beta(i),
                                      .gain = 1 - beta(i),
                                      .scale = i % 2 ? Tensor{} : t.at("scale"),
                                      .nesterov = nesterov});
                    smooth(ctx, list);
                  },
              .oracle =
                  [=](Values& v) {
                    for (int64_t i = 0; i < count; ++i)
                      for (int64_t k = pieces.start(i); k < pieces.start(i + 1); ++k) {
                        const double x = (1 - beta(i)) * v["g"][k] * (i % 2 ? 1 : v["scale"][0]);
                        if (remember) v["m"][k] = beta(i) * v["m"][k] + x;
                        v["u"][k] = !remember ? x : nesterov ? beta(i) * v["m"][k] + x : v["m"][k];
                      }
                  },
              .tolerance = 1e-6,
              .bytes = (remember ? 16.0 : 8.0) * pieces.total()};
  if (remember) made.name += nesterov ? ",nesterov" : ",mean";
  if (!in_place) made.name += half == HalfSmooth::u ? ",half_u" : ",half_g";
  return made;
}

inline OpCase adam_case(int64_t count, int64_t n, bool first, bool second) {
  const Pieces pieces{count, n};
  const Shape all{pieces.total()};
  const float beta1 = first ? 0.9f : 0, beta2 = second ? 0.95f : 0;
  OpCase made{.name = case_name("adam_direction", {{"count", count}, {"n", n}}),
              .operands = {{.name = "g", .shape = all},
                           {.name = "u", .shape = all, .output = true, .same_as = "g"},
                           {.name = "m", .shape = all, .output = true},
                           {.name = "v", .shape = all, .output = true},
                           {.name = "scale", .shape = {1}}},
              .run =
                  [=](Context& ctx, const Tensors& t) {
                    std::vector<AdamDirection> list;
                    for (int64_t i = 0; i < count; ++i)
                      list.push_back({.u = pieces.of(t.at("u"), i),
                                      .m = first ? pieces.of(t.at("m"), i) : Tensor{},
                                      .v = second ? pieces.of(t.at("v"), i) : Tensor{},
                                      .g = pieces.of(t.at("g"), i),
                                      .beta1 = beta1,
                                      .beta2 = beta2,
                                      .eps = 0.01f,
                                      .correction1 = 0.25f,
                                      .correction2 = 0.125f * static_cast<float>(1 + i % 3),
                                      .scale = i % 2 ? t.at("scale") : Tensor{}});
                    adam_direction(ctx, list);
                  },
              .oracle =
                  [=](Values& v) {
                    for (int64_t i = 0; i < count; ++i)
                      for (int64_t k = pieces.start(i); k < pieces.start(i + 1); ++k) {
                        const double x = v["g"][k] * (i % 2 ? v["scale"][0] : 1);
                        if (first) v["m"][k] = beta1 * v["m"][k] + (1 - beta1) * x;
                        if (second) v["v"][k] = beta2 * v["v"][k] + (1 - beta2) * x * x;
                        const double root =
                            second ? std::sqrt(v["v"][k] / (0.125 * static_cast<double>(1 + i % 3)))
                                   : std::abs(x);
                        v["u"][k] = (first ? v["m"][k] : x) / 0.25 / (root + 0.01f);
                      }
                  },
              .tolerance = 2e-6,
              .bytes = (8.0 + (first ? 8 : 0) + (second ? 8 : 0)) * pieces.total(),
              .prepare =
                  [](Values& v) {
                    for (double& value : v["v"]) value = std::abs(value);
                  }};
  if (first) made.name += ",m";
  if (second) made.name += ",v";
  return made;
}

inline OpCase sign_case(int64_t count, int64_t n) {
  const Pieces pieces{count, n};
  return {.name = case_name("sign", {{"count", count}, {"n", n}}),
          .operands = {{.name = "x", .shape = {pieces.total()}},
                       {.name = "u", .shape = {pieces.total()}, .output = true}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                std::vector<Sign> list;
                for (int64_t i = 0; i < count; ++i)
                  list.push_back({.u = pieces.of(t.at("u"), i), .x = pieces.of(t.at("x"), i)});
                sign(ctx, list);
              },
          .oracle =
              [](Values& v) {
                for (size_t k = 0; k < v["x"].size(); ++k)
                  v["u"][k] = v["x"][k] == 0 ? 0 : v["x"][k] > 0 ? 1 : -1;
              },
          .tolerance = 0,
          .bytes = 8.0 * pieces.total(),
          .prepare = [](Values& v) { v["x"].back() = 0; }};
}

inline OpCase apply_update_case(int64_t count, int64_t n, bool cautious) {
  const Pieces pieces{count, n};
  const auto step = [](int64_t i) { return 0.1f * static_cast<float>(1 + i % 5); };
  return {.name = case_name("apply_update", {{"count", count}, {"n", n}}) + (cautious ? ",cautious" : ""),
          .operands = {{.name = "w", .shape = {pieces.total()}, .output = true},
                       {.name = "u", .shape = {pieces.total()}},
                       {.name = "guard", .shape = {1}}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                std::vector<ApplyUpdate> list;
                for (int64_t i = 0; i < count; ++i)
                  list.push_back({.w = pieces.of(t.at("w"), i),
                                  .u = pieces.of(t.at("u"), i),
                                  .step = step(i),
                                  .decay = i % 3 == 0 ? 0 : 0.25f,
                                  .cautious = cautious,
                                  .guard = i % 2 ? t.at("guard") : Tensor{}});
                apply_update(ctx, list);
              },
          .oracle =
              [=](Values& v) {
                for (int64_t i = 0; i < count; ++i)
                  for (int64_t k = pieces.start(i); k < pieces.start(i + 1); ++k) {
                    double& w = v["w"][k];
                    const double u = v["u"][k];
                    const bool decays = i % 3 != 0 && (!cautious || u * w > 0);
                    w = w - (decays ? 0.25 * w : 0) - step(i) * u;
                  }
              },
          .tolerance = 1e-6,
          .bytes = 12.0 * pieces.total()};
}

inline OpCase clip_factor_case(int64_t n, double limit) {
  return {.name = case_name("clip_factor", {{"n", n}, {"limit", static_cast<int64_t>(limit)}}),
          .operands = {{.name = "squares", .shape = {n}},
                       {.name = "norm", .shape = {1}, .output = true},
                       {.name = "scale", .shape = {1}, .output = true}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                Arena arena("sums");
                Tensor sums, norm;
                arena.add(&sums, DType::f64, {n});
                arena.add(&norm, DType::f64, {1});
                arena.allocate(ctx);
                const OnHost from(ctx, t.at("squares"));
                OnHost to(ctx, sums, /*load=*/false);
                for (int64_t i = 0; i < n; ++i) to->f64()[i] = from->f32()[i];
                to.store();
                clip_factor(ctx, {.sums = sums, .limit = limit, .norm = norm, .scale = t.at("scale")});
                put_number(ctx, t.at("norm"), *OnHost(ctx, norm)->f64());
              },
          .oracle =
              [=](Values& v) {
                double sum = 0;
                for (double square : v["squares"]) sum += square;
                v["norm"][0] = std::sqrt(sum);
                v["scale"][0] = limit > 0 ? std::min(1.0, limit / std::sqrt(sum)) : 1;
              },
          .tolerance = 1e-6,
          .bytes = 8.0 * n,
          .prepare =
              [](Values& v) {
                for (double& square : v["squares"]) square = std::abs(square);
              }};
}

inline OpCase add_diagonal_case(int64_t batch, int64_t n) {
  return {.name = case_name("add_diagonal", {{"batch", batch}, {"n", n}}),
          .operands = {{.name = "x", .shape = {batch, n, n}, .output = true}},
          .run = [](Context& ctx, const Tensors& t) { add_diagonal(ctx, {.x = t.at("x"), .value = 3}); },
          .oracle =
              [=](Values& v) {
                for (int64_t i = 0; i < batch; ++i)
                  for (int64_t j = 0; j < n; ++j) v["x"][(i * n + j) * n + j] += 3;
              },
          .tolerance = 1e-6,
          .bytes = 8.0 * batch * n};
}

// ------------------------------------------------------------------------------------------------ attention

inline std::function<void(Values&)> attention_oracle(int64_t B, int64_t T, int64_t NH, int64_t HS) {
  return [=](Values& v) {
    const attention::Case c{.B = B, .T = T, .NH = NH, .HS = HS};
    const attention::Doubles nothing(v["out"].size());
    const attention::Oracle o = attention::oracle(c, v["qkv"], nothing);
    v["out"] = o.out;
    v["lse"] = o.lse;
  };
}

inline OpCase attention_forward_case(int64_t B, int64_t T, int64_t NH, int64_t HS,
                                     Op<AttentionForward> op = attention_forward) {
  const int64_t C = NH * HS;
  return {.name = case_name("attention_forward", {{"B", B}, {"T", T}, {"NH", NH}, {"HS", HS}}),
          .operands = {{.name = "out", .shape = {B, T, C}, .output = true, .half = true},
                       {.name = "lse", .shape = {B, NH, T}, .output = true},
                       {.name = "qkv", .shape = {B, T, 3 * C}, .half = true}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                op(ctx, {.out = t.at("out"), .lse = t.at("lse"), .qkv = t.at("qkv"), .NH = NH});
              },
          .oracle = attention_oracle(B, T, NH, HS),
          .tolerance = 5e-6,
          .flops = 2.0 * B * T * (T + 1) * C,  // two products of the pairs that exist
          .bytes = 4.0 * (4 * B * T * C + B * NH * T),
          .scratch_bytes = [=](const Context& ctx) { return attention_scratch_bytes(ctx, B, T, NH, HS); },
          .half_tolerance = 1.0 / 16};  // probabilities are bf16 too: sums that cancel lose digits
}

inline OpCase attention_backward_case(int64_t B, int64_t T, int64_t NH, int64_t HS,
                                      Op<AttentionBackward> op = attention_backward) {
  const int64_t C = NH * HS;
  return {.name = case_name("attention_backward", {{"B", B}, {"T", T}, {"NH", NH}, {"HS", HS}}),
          .operands = {{.name = "dqkv", .shape = {B, T, 3 * C}, .output = true, .half = true},
                       {.name = "dout", .shape = {B, T, C}, .half = true},
                       {.name = "out", .shape = {B, T, C}, .half = true},
                       {.name = "lse", .shape = {B, NH, T}},
                       {.name = "qkv", .shape = {B, T, 3 * C}, .half = true}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                op(ctx, {.dqkv = t.at("dqkv"),
                         .dout = t.at("dout"),
                         .out = t.at("out"),
                         .lse = t.at("lse"),
                         .qkv = t.at("qkv"),
                         .NH = NH});
              },
          .oracle =
              [=](Values& v) {
                const attention::Case c{.B = B, .T = T, .NH = NH, .HS = HS};
                const attention::Stored stored{v["out"], v["lse"]};
                v["dqkv"] = attention::oracle(c, v["qkv"], v["dout"], 0, &stored).dqkv;
              },
          .tolerance = 1e-5,
          .flops = 5.0 * B * T * (T + 1) * C,  // five products, though a GPU computes two of them twice
          .bytes = 4.0 * (8 * B * T * C + B * NH * T),
          .prepare = attention_oracle(B, T, NH, HS),
          .scratch_bytes = [=](const Context& ctx) { return attention_scratch_bytes(ctx, B, T, NH, HS); },
          .half_tolerance = 1.0 / 16,  // as above
          .loss =
              [=](const Values& v) {
                const attention::Case c{.B = B, .T = T, .NH = NH, .HS = HS};
                return sum_of_products(v.at("dout"), attention::oracle(c, v.at("qkv"), v.at("dout")).out);
              },
          .gradients = {{"dqkv", "qkv"}}};
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
  // Widths of models, and around the limits of how many lanes of a GPU share a row.
  for (int64_t C : {128, 256, 264, 512, 768, 1024, 1280, 1600, 2048, 3072, 4096, 6144, 6152}) {
    add(layernorm_forward_case(1, 11, C, Residual::separate));
    add(layernorm_backward_case(1, 11, C, true, true, Into::dresidual));
  }
  add(layernorm_backward_case(2, 41, 768, false, false));
  add(layernorm_backward_case(2, 4150, 8, true, true));  // all blocks of a GPU
  add(embedding_forward_case(2, 5, 768, 29));
  add(embedding_backward_case(3, 67, 64, 7, true, true));  // tokens in many groups of the GPU
  add(embedding_backward_case(2, 150, 264, 2, false, false));
  add(embedding_backward_case(7, 41, 36, 1, true, false));  // one token everywhere
  add(embedding_backward_case(1, 64, 1032, 500, true, false));
  for (const auto& [N, V, Vp] : {std::array<int64_t, 3>{1, 1, 1},
                                 {1, 257, 384},
                                 {5, 33, 33},
                                 {9, 1025, 1152},
                                 {3, 5001, 5120},
                                 {2, 50257, 50304},
                                 {1, 120001, 120064}})  // longer than the shared memory of a GPU
    for (bool gradient : {false, true}) add(cross_entropy_case(N, V, Vp, gradient));
  for (Orientation o : {kNN, kNT, kTN, kTT}) {
    add(matmul_case(1, 1, 1, o));
    add(matmul_case(7, 33, 65, o, true));
    add(matmul_case(7, 33, 65, o, false, -0.5f, 2));
    add(matmul_case(130, 67, 129, o, true, 2, 0.5f));
    add(batched_matmul_case(3, 9, 17, Symmetry::none, o));
  }
  add(matmul_case(1, 50, 40, kNT, true));
  for (const auto& [rows, out, in] :
       {std::array<int64_t, 3>{1, 1, 1}, {7, 33, 65}, {9, 40, 24}, {130, 72, 31}, {600, 16, 9}}) {
    for (bool bias : {false, true}) add(matmul_gelu_case(rows, out, in, bias));
    add(matmul_dgelu_case(rows, out, in));
    for (bool accumulate : {false, true})
      for (bool dbias : {false, true}) add(weight_gradient_case(rows, out, in, accumulate, dbias));
  }
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
    for (bool to_float : {false, true}) add(cast_case(rows, cols, to_float));
    add(transpose_case(1, rows, cols));
    for (bool by_rows : {true, false}) {
      add(norms_case(by_rows, rows, cols));
      for (bool divide : {true, false}) add(scale_case(by_rows, rows, cols, divide, divide));
    }
  }
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{513, 40}, {1100, 256}, {700, 1031}})
    add(bias_backward_case(rows, cols, true));
  for (bool to_float : {false, true}) add(cast_case(64, 72, to_float));
  for (int64_t batch : {2, 3}) add(transpose_case(batch, 64, 128 + batch));
  for (bool by_rows : {true, false}) {  // longer than one part
    add(norms_case(by_rows, by_rows ? 3 : 700, by_rows ? 20003 : 65));
    add(norms_case(by_rows, by_rows ? 2 : 513, by_rows ? 8192 : 40));
  }
  for (const char* op : {"sum_of_squares", "dot", "sum_abs", "max_abs"})
    for (int64_t n : {1, 15, 1025, 300000}) add(whole_tensor_case(op, n));
  for (int64_t n : {1, 33, 5000})
    for (bool accumulate : {false, true}) add(mean_case(n, accumulate));
  // One tensor, some of odd sizes, larger than a chunk, and more than the arguments of a launch list.
  for (const auto& [count, n] : {std::pair<int64_t, int64_t>{1, 1}, {3, 8191}, {4, 20000}, {150, 5}}) {
    add(sums_of_squares_case(count, n));
    for (HalfSmooth half : {HalfSmooth::none, HalfSmooth::u, HalfSmooth::g}) {
      add(smooth_case(count, n, false, false, half));
      add(smooth_case(count, n, true, false, half));
    }
    add(smooth_case(count, n, true, true, HalfSmooth::none));
    add(smooth_case(count, n, true, true, HalfSmooth::u));
    for (bool first : {false, true})
      for (bool second : {false, true}) add(adam_case(count, n, first, second));
    add(sign_case(count, n));
    for (bool cautious : {false, true}) add(apply_update_case(count, n, cautious));
  }
  for (int64_t n : {1, 149, 1000})
    for (double limit : {0, 1, 1000}) add(clip_factor_case(n, limit));
  for (const auto& [B, T, NH, HS] :
       {std::array<int64_t, 4>{1, 1, 1, 3}, {2, 7, 3, 4}, {1, 70, 2, 20}, {1, 66, 1, 80}}) {
    // On a GPU, heads of 64 and 128 in bf16 round inside too: test_gpu_attention.cpp has bounds for that.
    add(attention_forward_case(B, T, NH, HS));
    add(attention_backward_case(B, T, NH, HS));
  }
  add(add_diagonal_case(1, 1));
  add(add_diagonal_case(3, 41));
  return cases;
}

/// Sizes of a training step; GPT-2 124M at 4 x 256 tokens unless told otherwise. The logits exist for `chunk`
/// rows at a time.
struct TrainingSizes {
  int64_t B = 4, T = 256, C = 768, NH = 12, V = 50257, chunk = 256;
};

/// Every operation of a training step of GPT-2, and the products of its Newton-Schulz.
inline std::vector<OpCase> training_cases(const TrainingSizes& sizes = {}) {
  const auto [B, T, C, NH, V, chunk] = sizes;
  const int64_t BT = B * T, Vp = (V + 127) / 128 * 128;
  std::vector<OpCase> cases{embedding_forward_case(B, T, C, Vp),
                            embedding_backward_case(B, T, C, Vp, true, false),
                            layernorm_forward_case(B, T, C, Residual::none),
                            layernorm_forward_case(B, T, C, Residual::separate),
                            layernorm_backward_case(B, T, C, true, false, Into::dresidual),
                            gelu_forward_case(B, T, 4 * C),
                            gelu_backward_case(B, T, 4 * C, true),
                            bias_backward_case(BT, C, false),
                            bias_backward_case(BT, 4 * C, false),
                            attention_forward_case(B, T, NH, C / NH),
                            attention_backward_case(B, T, NH, C / NH),
                            cast_case(4 * C, C, false),
                            transpose_case(12, C, C),
                            cross_entropy_case(chunk, V, Vp, false),
                            cross_entropy_case(chunk, V, Vp, true),
                            cross_entropy_case(BT, 257, 384, true),
                            whole_tensor_case("sum_of_squares", Vp * C),
                            whole_tensor_case("dot", 4 * C * C),
                            whole_tensor_case("max_abs", 4 * C * C),
                            sums_of_squares_case(72, C * C),
                            smooth_case(72, C * C, true, true, HalfSmooth::u),
                            smooth_case(72, C * C, false, false, HalfSmooth::g),
                            adam_case(1, Vp * C, true, true),
                            apply_update_case(72, C * C, false),
                            norms_case(true, Vp, C),
                            norms_case(false, 4 * C, C),
                            scale_case(true, Vp, C, true, true),
                            scale_case(false, 4 * C, C, true, true)};
  for (const auto& [out, in] : {std::pair<int64_t, int64_t>{3 * C, C}, {C, C}, {4 * C, C}, {C, 4 * C}}) {
    cases.push_back(matmul_case(BT, out, in, kNT, true));  // forward
    cases.push_back(matmul_case(BT, in, out, kNN));        // input gradient
    cases.push_back(matmul_case(out, in, BT, kTN));        // weight gradient
  }
  cases.push_back(matmul_gelu_case(BT, 4 * C, C, true));
  cases.push_back(matmul_dgelu_case(BT, 4 * C, C));
  for (const auto& [out, in] : {std::pair<int64_t, int64_t>{4 * C, C}, {C, 4 * C}})
    cases.push_back(weight_gradient_case(BT, out, in, true, true));
  cases.push_back(matmul_case(chunk, Vp, C, kNT));  // the head, a chunk of rows
  cases.push_back(matmul_case(chunk, C, Vp, kNN));
  cases.push_back(matmul_case(Vp, C, chunk, kTN, false, 1, 1));
  for (const auto& [batch, M, K] : {std::array<int64_t, 3>{12, C, C}, {12, C, 4 * C}, {6, C / 2, C / 2}}) {
    cases.push_back(batched_matmul_case(batch, M, K, Symmetry::gram));
    if (K == M) cases.push_back(batched_matmul_case(batch, M, M, Symmetry::square));
  }
  return cases;
}
