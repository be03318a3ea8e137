// The expected numbers of tests/data/optim_golden.json (float64, from the maths alone) and small matrices for
// tests.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "model/kernels/context.h"

/// A matrix that owns its memory, f32 or f64.
template <typename T>
struct MatrixOf {
  int64_t rows = 0, cols = 0;
  std::vector<T> data;

  MatrixOf() = default;
  MatrixOf(int64_t rows, int64_t cols) : rows(rows), cols(cols), data(static_cast<size_t>(rows * cols)) {}
  /// Nested lists, row-major.
  explicit MatrixOf(const nlohmann::json& lists);
  T& operator()(int64_t i, int64_t j) { return data[static_cast<size_t>(i * cols + j)]; }
  T operator()(int64_t i, int64_t j) const { return data[static_cast<size_t>(i * cols + j)]; }
  Tensor tensor() { return {data.data(), Shape{rows, cols}}; }
  Tensor batch() { return {data.data(), Shape{1, rows, cols}}; }
  MatrixOf transposed() const {
    MatrixOf t(cols, rows);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) t(j, i) = (*this)(i, j);
    return t;
  }
};
using Matrix = MatrixOf<float>;
using Matrix64 = MatrixOf<double>;

Matrix random_matrix(int64_t rows, int64_t cols, uint32_t seed, float scale = 1);
/// Standard normal numbers that f32 holds, so that both dtypes see the same.
Matrix64 normal(int64_t rows, int64_t cols, uint32_t seed);
Matrix64 identity(int64_t n);

/// The same numbers in another type.
template <typename T, typename From>
MatrixOf<T> as(const MatrixOf<From>& m) {
  MatrixOf<T> out(m.rows, m.cols);
  for (size_t i = 0; i < m.data.size(); ++i) out.data[i] = static_cast<T>(m.data[i]);
  return out;
}

template <typename T>
MatrixOf<T> scaled(MatrixOf<T> m, double c) {
  for (T& x : m.data) x = static_cast<T>(c * x);
  return m;
}

/// a b in float64.
template <typename T>
MatrixOf<T> product(const MatrixOf<T>& a, const MatrixOf<T>& b) {
  MatrixOf<T> c(a.rows, b.cols);
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t j = 0; j < b.cols; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < a.cols; ++k) sum += static_cast<double>(a(i, k)) * b(k, j);
      c(i, j) = static_cast<T>(sum);
    }
  return c;
}

/// <a, b>
template <typename T>
double inner(const MatrixOf<T>& a, const MatrixOf<T>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.data.size(); ++i) sum += static_cast<double>(a.data[i]) * b.data[i];
  return sum;
}

/// The largest |a - b| over the largest |b|.
template <typename T>
double deviation(const MatrixOf<T>& a, const MatrixOf<T>& b) {
  double difference = 0, largest = 1e-300;
  for (size_t i = 0; i < b.data.size(); ++i) {
    difference = std::max(difference, std::fabs(static_cast<double>(a.data.at(i)) - b.data[i]));
    largest = std::max(largest, std::fabs(static_cast<double>(b.data[i])));
    if (std::isnan(a.data[i])) return a.data[i];
  }
  return difference / largest;
}

const nlohmann::json& optim_golden();

/// Makes a context run on some device: tests of the CPU and of the GPU share their bodies.
using UseDevice = void (*)(Context&);
inline void on_cpu(Context& ctx) {
  use_cpu(ctx, 2);
}

/// The CPU, and the GPU or the executor where this binary has one.
std::vector<UseDevice> both_devices();

/// Takes values to where ctx computes, in the tensor's dtype, and brings them back.
template <typename T>
void upload(Context& ctx, const Tensor& to, const MatrixOf<T>& from);
template <typename T = float>
MatrixOf<T> download(Context& ctx, const Tensor& from);
template <typename T>
constexpr DType dtype_of() {
  return sizeof(T) == 8 ? DType::f64 : DType::f32;
}

/// A matrix in memory where ctx computes.
template <typename T>
class ThereOf {
 public:
  ThereOf(Context& ctx, const MatrixOf<T>& m, DType dtype = dtype_of<T>()) : ctx_(ctx) {
    arena_.add(&tensor_, dtype, {m.rows, m.cols});
    arena_.allocate(ctx);
    upload(ctx, tensor_, m);
  }
  const Tensor& tensor() const { return tensor_; }
  /// (batch, rows / batch, cols)
  Tensor batch(int64_t batch = 1) const {
    return tensor_.view({batch, tensor_.shape[0] / batch, tensor_.shape[1]});
  }
  MatrixOf<T> here() const { return download<T>(ctx_, tensor_); }

 private:
  Context& ctx_;
  Arena arena_{"test"};
  Tensor tensor_;
};
using There = ThereOf<float>;

/// A context on the CPU with plenty of scratch.
struct CpuContext : Context {
  explicit CpuContext(int threads = 2, int64_t scratch_bytes = int64_t{64} << 20) {
    use_cpu(*this, threads);
    scratch.reserve(scratch_bytes);
  }
};
