// Cases: Norms, sums and scalings of tensors, rows and columns.
#pragma once

#include "model/kernels/reduce.h"
#include "tests/cases/op_case.h"

/// Brings numbers to an operand, f32 or f64.
inline void put_numbers(Context& ctx, const Tensor& to, const double* values) {
  OnHost host(ctx, to, /*load=*/false);
  for (int64_t i = 0; i < to.size(); ++i)
    if (to.dtype == DType::f64)
      host->f64()[i] = values[i];
    else
      host->f32()[i] = static_cast<float>(values[i]);
  host.store();
}
inline void put_number(Context& ctx, const Tensor& to, double value) {
  put_numbers(ctx, to, &value);
}

/// A function of whole tensors to one number.
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
struct TensorPieces {
  int64_t count, n;
  int64_t more(int64_t i) const { return n % 64 == 0 ? 0 : i % 3; }
  int64_t size(int64_t i) const { return n + more(i); }
  int64_t start(int64_t i) const { return i * n + (n % 64 == 0 ? 0 : i / 3 * 3 + i % 3 / 2); }
  int64_t total() const { return start(count); }
  Tensor of(const Tensor& all, int64_t i) const { return all.slice(start(i), size(i)); }
};

/// Results in float64 stay where ctx computes; the case gets them in its own dtype.
inline OpCase sums_of_squares_case(int64_t count, int64_t n) {
  const TensorPieces pieces{count, n};
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
                put_numbers(ctx, t.at("sums"), OnHost(ctx, sums)->f64());
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

/// Divided or multiplied by some lengths, and multiplied by others, in one pass.
inline OpCase scale_twice_case(int64_t rows, int64_t cols, bool divide) {
  return {.name = case_name("scale_rows", {{"rows", rows}, {"cols", cols}}) +
                  (divide ? ",divide,times" : ",times"),
          .operands = {{.name = "x", .shape = {rows, cols}, .half = true},
                       {.name = "y", .shape = {rows, cols}, .output = true, .half = true},
                       {.name = "scales", .shape = {rows}, .scale = 0.2, .offset = 1},
                       {.name = "times", .shape = {rows}}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                scale_rows(ctx, {.y = t.at("y"),
                                 .x = t.at("x"),
                                 .scales = t.at("scales"),
                                 .factor = 3,
                                 .divide = divide,
                                 .times = t.at("times")});
              },
          .oracle =
              [=](Values& v) {
                for (int64_t i = 0; i < rows * cols; ++i) {
                  const double scale = v["scales"][i / cols];
                  const double by = !divide ? scale : scale == 0 ? 0 : 1 / scale;
                  v["y"][i] = 3 * v["x"][i] * by * v["times"][i / cols];
                }
              },
          .tolerance = 1e-6,
          .bytes = 8.0 * rows * cols,
          .prepare = [](Values& v) { v["scales"].back() = 0; }};
}
