// Cases: q-norms of rows and columns, and the vectors that attain them.
#pragma once

#include <limits>

#include "optim/lines.h"
#include "tests/cases/op_case.h"

/// q = num / den; infinite when den is 0.
struct Exponent {
  int64_t num, den;
  double value() const {
    return den == 0 ? std::numeric_limits<double>::infinity()
                    : static_cast<double>(num) / static_cast<double>(den);
  }
};

struct LinesCase {
  int64_t batch, rows, cols;
  Lines lines;
  Exponent q;
  DType dtype = DType::f32;
  bool in_place = false;

  bool by_rows() const { return lines == Lines::rows; }
  int64_t size() const { return batch * rows * cols; }
  int64_t count() const { return batch * (by_rows() ? rows : cols); }
  /// The line that element i is in.
  int64_t line_of(int64_t i) const { return by_rows() ? i / cols : i / (rows * cols) * cols + i % cols; }
  double tolerance() const { return dtype == DType::f64 ? 1e-13 : 1e-6; }
  std::string name(const char* op) const {
    std::string name =
        case_name(op, {{"batch", batch}, {"rows", rows}, {"cols", cols}, {"num", q.num}, {"den", q.den}});
    if (!by_rows()) name += ",columns";
    if (dtype == DType::f64) name += ",f64";
    if (in_place) name += ",in_place";
    return name;
  }
  /// The last line is zero; where there are others, the first ends with an entry as large as its largest.
  void prepare(std::vector<double>& x) const {
    if (count() == 1) return;
    double largest = 0;
    int64_t last = 0;
    for (int64_t i = 0; i < size(); ++i) {
      if (line_of(i) == count() - 1) x[i] = 0;
      if (line_of(i) == 0) largest = std::max(largest, std::abs(x[i])), last = i;
    }
    x[last] = -largest;
  }
  std::vector<double> norms(const std::vector<double>& x) const {
    std::vector<double> norms(count());
    for (int64_t i = 0; i < size(); ++i) {
      double& norm = norms[line_of(i)];
      norm = q.den == 0 ? std::max(norm, std::abs(x[i])) : norm + std::pow(std::abs(x[i]), q.value());
    }
    for (double& norm : norms)
      if (q.den != 0) norm = std::pow(norm, 1 / q.value());
    return norms;
  }
};

inline OpCase line_norms_case(const LinesCase& of) {
  return {.name = of.name("line_norms"),
          .operands = {{.name = "x", .shape = {of.batch, of.rows, of.cols}, .dtype = of.dtype},
                       {.name = "norms", .shape = {of.count()}, .output = true, .dtype = of.dtype}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                line_norms(ctx,
                           {.norms = t.at("norms"), .x = t.at("x"), .lines = of.lines, .q = of.q.value()});
              },
          .oracle = [=](Values& v) { v["norms"] = of.norms(v["x"]); },
          .tolerance = of.tolerance(),
          .bytes = 1.0 * dtype_bytes(of.dtype) * of.size(),
          .prepare = [=](Values& v) { of.prepare(v["x"]); }};
}

inline OpCase line_duals_case(const LinesCase& of) {
  const Shape shape{of.batch, of.rows, of.cols};
  return {.name = of.name("line_duals"),
          .operands = {{.name = "x", .shape = shape, .dtype = of.dtype},
                       {.name = "y",
                        .shape = shape,
                        .output = true,
                        .same_as = of.in_place ? "x" : "",
                        .dtype = of.dtype}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                line_duals(
                    ctx,
                    {.y = t.at("y"), .x = t.at("x"), .lines = of.lines, .q = of.q.value(), .factor = -1.5});
              },
          .oracle =
              [=](Values& v) {
                const std::vector<double>&x = v["x"], norms = of.norms(x);
                std::vector<bool> found(norms.size());
                for (int64_t i = 0; i < of.size(); ++i) {
                  const double size = std::abs(x[i]), norm = norms[of.line_of(i)];
                  double t = 0;
                  if (of.q.den == 0) {
                    t = size == norm && !found[of.line_of(i)];
                    found[of.line_of(i)] = found[of.line_of(i)] || t > 0;
                  } else if (size > 0) {
                    t = std::pow(size / norm, of.q.value() - 1);
                  }
                  v["y"][i] = size == 0 ? 0 : (x[i] < 0 ? 1.5 : -1.5) * t;
                }
              },
          .tolerance = of.tolerance(),
          .bytes = 2.0 * dtype_bytes(of.dtype) * of.size(),
          .prepare =
              [=](Values& v) {
                of.prepare(v["x"]);
                if (of.in_place) v["y"] = v["x"];
              }};
}
