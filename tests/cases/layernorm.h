// Cases: LayerNorm, alone and fused with the residual addition.
#pragma once

#include "model/kernels/layernorm.h"
#include "tests/cases/op_case.h"

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
