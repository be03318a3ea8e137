// Cases: The largest attention logits, and what is done about them.
#pragma once

#include <limits>

#include "model/kernels/head_max.h"
#include "optim/qk_clip.h"
#include "tests/cases/op_case.h"

/// The operand `from`, which is float32, in float64 where ctx computes; back() returns it there.
class InDouble {
 public:
  InDouble(Context& ctx, const Tensor& operand) : ctx_(ctx), operand_(operand) {
    arena_.add(&tensor_, DType::f64, operand.shape);
    arena_.allocate(ctx);
    const OnHost from(ctx, operand);
    OnHost to(ctx, tensor_, /*load=*/false);
    std::copy_n(from->f32(), operand.size(), to->f64());
    to.store();
  }
  const Tensor& tensor() const { return tensor_; }
  void back() {
    const OnHost from(ctx_, tensor_);
    OnHost to(ctx_, operand_, /*load=*/false);
    for (int64_t i = 0; i < operand_.size(); ++i) to->f32()[i] = static_cast<float>(from->f64()[i]);
    to.store();
  }

 private:
  Context& ctx_;
  Tensor operand_, tensor_;
  Arena arena_{"in double"};
};

inline OpCase head_max_case(int64_t B, int64_t NH, int64_t T, bool accumulate) {
  return {.name = case_name("head_max", {{"B", B}, {"NH", NH}, {"T", T}}) + (accumulate ? ",accumulate" : ""),
          .operands = {{.name = "largest", .shape = {NH}, .output = true},
                       {.name = "row_max", .shape = {B, NH, T}, .offset = -1}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                InDouble largest(ctx, t.at("largest"));
                head_max(ctx,
                         {.largest = largest.tensor(), .row_max = t.at("row_max"), .accumulate = accumulate});
                largest.back();
              },
          .oracle =
              [=](Values& v) {
                for (int64_t h = 0; h < NH; ++h) {
                  double most = accumulate ? v["largest"][h] : -std::numeric_limits<double>::infinity();
                  for (int64_t b = 0; b < B; ++b)
                    for (int64_t t = 0; t < T; ++t) most = std::max(most, v["row_max"][(b * NH + h) * T + t]);
                  v["largest"][h] = most;
                }
              },
          .tolerance = 0,
          .bytes = 4.0 * B * NH * T};
}

/// `count` layers of NH heads of HS numbers: weights and biases, some of them with a bf16 copy. Half of the
/// heads are beyond tau.
inline OpCase qk_clip_case(int64_t count, int64_t NH, int64_t HS, float alpha) {
  const int64_t C = NH * HS;
  const float tau = 3;
  return {.name = case_name("qk_clip", {{"count", count}, {"NH", NH}, {"HS", HS}}) +
                  (alpha == 0.5f ? "" : ",uneven"),
          .operands = {{.name = "weight", .shape = {count, 3 * C, C}, .output = true},
                       {.name = "bias", .shape = {count, 3 * C}, .output = true},
                       {.name = "largest", .shape = {count, NH}, .scale = 2, .offset = 3}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                const InDouble largest(ctx, t.at("largest"));
                std::vector<QkClipRows> list;
                for (int64_t i = 0; i < count; ++i)
                  for (const char* name : {"weight", "bias"})
                    list.push_back(
                        {.x = t.at(name)[i], .largest = largest.tensor()[i], .tau = tau, .alpha = alpha});
                qk_clip(ctx, list);
              },
          .oracle =
              [=](Values& v) {
                for (int64_t i = 0; i < count; ++i)
                  for (int64_t row = 0; row < 2 * C; ++row) {  // rows of q, then of k
                    const double S = v["largest"][i * NH + row % C / HS];
                    if (S <= tau) continue;
                    const double factor = std::pow(tau / S, row < C ? alpha : 1 - alpha);
                    v["bias"][i * 3 * C + row] *= factor;
                    for (int64_t c = 0; c < C; ++c) v["weight"][(i * 3 * C + row) * C + c] *= factor;
                  }
              },
          .tolerance = 1e-6,
          .bytes = 16.0 * count * C * (C + 1)};
}
