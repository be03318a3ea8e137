// Cases: Casts and transposes.
#pragma once

#include "model/kernels/cast.h"
#include "tests/cases/op_case.h"

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

/// The same between float32 and float64. y is exactly x: the values are float32 numbers.
inline OpCase cast_wide_case(int64_t rows, int64_t cols, bool to_wide) {
  const auto dtype = [](bool wide) { return wide ? DType::f64 : DType::f32; };
  OpCase result = cast_case(rows, cols, to_wide);
  result.name = case_name("cast", {{"rows", rows}, {"cols", cols}}) + (to_wide ? ",to_f64" : ",from_f64");
  result.operands = {{.name = "y", .shape = {rows, cols}, .output = true, .dtype = dtype(to_wide)},
                     {.name = "x", .shape = {rows, cols}, .dtype = dtype(!to_wide)}};
  result.prepare = [](Values& v) {
    for (double& x : v["x"]) x = static_cast<float>(x);
  };
  return result;
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
