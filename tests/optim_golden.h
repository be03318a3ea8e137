// The expected numbers of tests/data/optim_golden.json (float64, from the maths alone) and small matrices for
// tests.
#pragma once

#include <fstream>
#include <random>
#include <stdexcept>
#include <vector>

#include <nlohmann/json.hpp>

#include "model/kernels/context.h"

/// A matrix that owns its memory, f32 or f64.
template <typename T>
struct MatrixOf {
  int64_t rows = 0, cols = 0;
  std::vector<T> data;

  MatrixOf() = default;
  MatrixOf(int64_t rows, int64_t cols) : rows(rows), cols(cols), data(static_cast<size_t>(rows * cols)) {}
  /// Nested lists, row-major.
  explicit MatrixOf(const nlohmann::json& lists)
      : MatrixOf(static_cast<int64_t>(lists.size()), static_cast<int64_t>(lists.at(0).size())) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j)
        (*this)(i, j) = lists.at(static_cast<size_t>(i)).at(static_cast<size_t>(j));
  }
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

inline Matrix random_matrix(int64_t rows, int64_t cols, uint32_t seed, float scale = 1) {
  Matrix m(rows, cols);
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (float& x : m.data) x = scale * normal(random);
  return m;
}

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

inline const nlohmann::json& optim_golden() {
  static const nlohmann::json numbers = [] {
    std::ifstream file("tests/data/optim_golden.json");
    if (!file)
      throw std::runtime_error("tests/data/optim_golden.json is missing: run the tests from the repository");
    return nlohmann::json::parse(file);
  }();
  return numbers;
}

/// Makes a context run on some device: tests of the CPU and of the GPU share their bodies.
using UseDevice = void (*)(Context&);
inline void on_cpu(Context& ctx) {
  use_cpu(ctx, 2);
}

/// The CPU, and the GPU or the executor where this binary has one.
inline std::vector<UseDevice> both_devices() {
  std::vector<UseDevice> list = {on_cpu};
  if (kHaveGpu) list.push_back([](Context& ctx) { use_gpu(ctx, 0, DType::f32); });
  return list;
}

/// Takes values to where ctx computes, in the tensor's dtype, and brings them back.
template <typename T>
void upload(Context& ctx, const Tensor& to, const MatrixOf<T>& from) {
  OnHost host(ctx, to, /*load=*/false);
  for (int64_t i = 0; i < to.size(); ++i) {
    const T value = from.data.at(static_cast<size_t>(i));
    if (to.dtype == DType::bf16)
      host->bf16()[i] = to_bf16(static_cast<float>(value));
    else if (to.dtype == DType::f64)
      host->f64()[i] = value;
    else
      host->f32()[i] = static_cast<float>(value);
  }
  host.store();
}
template <typename T = float>
MatrixOf<T> download(Context& ctx, const Tensor& from) {
  const OnHost host(ctx, from);
  MatrixOf<T> m(from.rows(), from.cols());
  for (int64_t i = 0; i < from.size(); ++i) {
    T& value = m.data[static_cast<size_t>(i)];
    if (from.dtype == DType::bf16)
      value = to_float(host->bf16()[i]);
    else
      value = from.dtype == DType::f64 ? static_cast<T>(host->f64()[i]) : host->f32()[i];
  }
  return m;
}
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
