// Cases: Matrix products with their epilogues, batches of them, and bias gradients.
#pragma once

#include "model/kernels/bias.h"
#include "model/kernels/matmul.h"
#include "tests/cases/gelu.h"
#include "tests/cases/op_case.h"

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
    const auto &a = v.at("a"), &h = v.at("h"), &b = v.at("b");
    double sum = 0;
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < N; ++n) {
        const double y = gelu_of(h[m * N + n]);
        for (int64_t k = 0; k < K; ++k) sum += a[m * K + k] * y * b[k * N + n];
      }
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
