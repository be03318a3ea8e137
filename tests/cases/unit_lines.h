// Cases: Directions whose lines have one length, and the sums of an escape velocity.
#pragma once

#include "optim/escape_sums.h"
#include "optim/unit_lines.h"
#include "tests/cases/op_case.h"
#include "tests/cases/reduce.h"

/// Where the direction goes: kept in u, kept in g, or into a weight without and with decay where it agrees.
enum class UnitInto { u, g, w, cautious };

inline OpCase unit_lines_case(Lines lines, int64_t rows, int64_t cols, UnitInto to) {
  const Shape shape{rows, cols};
  const bool by_rows = lines == Lines::rows, moves = to == UnitInto::w || to == UnitInto::cautious;
  const double decay = to == UnitInto::cautious ? 0.25 : 0;
  constexpr const char* kNames[] = {"", ",in_place", ",into", ",cautious"};
  return {.name = case_name("unit_lines", {{"rows", rows}, {"cols", cols}}) + (by_rows ? "" : ",columns") +
                  kNames[static_cast<int>(to)],
          .operands = {{.name = "g", .shape = shape},
                       {.name = "u", .shape = shape, .output = true, .same_as = to == UnitInto::g ? "g" : ""},
                       {.name = "w", .shape = shape, .output = true},
                       {.name = "guard", .shape = {1}}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                unit_lines(ctx, {.u = moves ? Tensor{} : t.at("u"),
                                 .g = t.at("g"),
                                 .lines = lines,
                                 .factor = 1.5,
                                 .into = {.w = moves ? t.at("w") : Tensor{},
                                          .step = 0.5,
                                          .decay = decay,
                                          .cautious = to == UnitInto::cautious,
                                          .guard = moves ? t.at("guard") : Tensor{}}});
              },
          .oracle =
              [=](Values& v) {
                std::vector<double> squares(by_rows ? rows : cols);
                const std::vector<double> g = v["g"];
                for (int64_t i = 0; i < rows * cols; ++i)
                  squares[by_rows ? i / cols : i % cols] += g[i] * g[i];
                for (int64_t i = 0; i < rows * cols; ++i) {
                  const double norm = std::sqrt(squares[by_rows ? i / cols : i % cols]);
                  const double u = norm == 0 ? 0 : 1.5 * g[i] / norm;
                  double& w = v["w"][i];
                  if (moves)
                    w = w - (u * w > 0 ? decay * w : 0) - 0.5 * u;
                  else
                    v["u"][i] = u;
                }
              },
          .tolerance = 2e-6,
          .bytes = (moves ? 12.0 : 8.0) * rows * cols,
          .prepare =
              [=](Values& v) {  // the last line is zero
                for (int64_t i = 0; i < rows * cols; ++i)
                  if (by_rows ? i / cols == rows - 1 && rows > 1 : i % cols == cols - 1 && cols > 1)
                    v["g"][i] = 0;
                if (to == UnitInto::g) v["u"] = v["g"];
              },
          .scratch_bytes =
              [=](const Context&) { return unit_lines_scratch_bytes(rows, cols, lines, DType::f64); }};
}

/// Lines whose lengths are known: those that the operation takes are not these.
inline OpCase unit_lines_of_known_norms_case(Lines lines, int64_t rows, int64_t cols) {
  const bool by_rows = lines == Lines::rows;
  const Shape shape{rows, cols};
  return {
      .name =
          case_name("unit_lines", {{"rows", rows}, {"cols", cols}}) + (by_rows ? "" : ",columns") + ",norms",
      .operands = {{.name = "g", .shape = shape},
                   {.name = "norms", .shape = {by_rows ? rows : cols}, .offset = 8},
                   {.name = "u", .shape = shape, .output = true}},
      .run =
          [=](Context& ctx, const Tensors& t) {
            unit_lines(
                ctx, {.u = t.at("u"), .g = t.at("g"), .lines = lines, .factor = 1.5, .norms = t.at("norms")});
          },
      .oracle =
          [=](Values& v) {
            for (int64_t i = 0; i < rows * cols; ++i)
              v["u"][i] = 1.5 * v["g"][i] / v["norms"][by_rows ? i / cols : i % cols];
          },
      .tolerance = 2e-6,
      .bytes = 8.0 * rows * cols,
      .scratch_bytes =
          [=](const Context&) { return unit_lines_scratch_bytes(rows, cols, lines, DType::f64); }};
}

/// `sums`: with a running sum of gradients. `steps`: and the step that Adam makes of g, into w; without
/// `sums` with ||g||_1, too.
inline OpCase escape_sums_case(int64_t n, bool sums, bool steps = false) {
  OpCase made{.name = case_name("escape_sums", {{"n", n}}) + (sums ? ",s" : "") + (steps ? ",then" : ""),
              .operands = {{.name = "g", .shape = {n}},
                           {.name = "w", .shape = {n}, .output = true},
                           {.name = "start", .shape = {n}, .offset = 0.5},
                           {.name = "s", .shape = {n}, .output = true},
                           {.name = "m", .shape = {n}, .output = true},
                           {.name = "v", .shape = {n}, .output = true},
                           {.name = "along", .shape = {1}, .output = true},
                           {.name = "dual", .shape = {1}, .output = true}},
              .run =
                  [=](Context& ctx, const Tensors& t) {
                    const AdamDirection step{.m = t.at("m"),
                                             .v = t.at("v"),
                                             .g = t.at("g"),
                                             .beta1 = 0.875,
                                             .beta2 = 0.75,
                                             .eps = 0.125,
                                             .into = {.w = t.at("w"), .step = 0.5, .decay = 0.25}};
                    const Measured found = escape_sums(ctx, {.g = t.at("g"),
                                                             .w = t.at("w"),
                                                             .start = t.at("start"),
                                                             .s = sums ? t.at("s") : Tensor{},
                                                             .beta = 0.875,
                                                             .gain = 0.25,
                                                             .sizes = !sums && steps,
                                                             .then = steps ? &step : nullptr});
                    put_number(ctx, t.at("along"), found.along);
                    put_number(ctx, t.at("dual"), found.dual);
                  },
              .oracle =
                  [=](Values& v) {
                    double along = 0, dual = 0;
                    for (int64_t i = 0; i < n; ++i) {
                      const double g = v["g"][i];
                      double &w = v["w"][i], &s = v["s"][i], &first = v["m"][i], &second = v["v"][i];
                      along += g * (v["start"][i] - w);
                      if (sums) s = 0.875 * s + 0.25 * g, dual += std::abs(s);
                      if (!steps) continue;
                      if (!sums) dual += std::abs(g);
                      first = 0.875 * first + 0.125 * g;
                      second = 0.75 * second + 0.25 * g * g;
                      w -= 0.25 * w + 0.5 * first / (std::sqrt(second) + 0.125);
                    }
                    v["along"][0] = along, v["dual"][0] = dual;
                  },
              .tolerance = 1e-6,
              .bytes = ((sums ? 20.0 : 12.0) + (steps ? 20.0 : 0)) * n,
              .prepare =
                  [](Values& v) {
                    for (double& value : v["v"]) value = std::abs(value);
                  },
              .scratch_bytes = [](const Context&) { return whole_scratch_bytes(); }};
  return made;
}
