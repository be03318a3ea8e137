// Cases: GELU, forward and backward.
#pragma once

#include "model/kernels/gelu.h"
#include "tests/cases/op_case.h"

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
