// The expected numbers of tests/data/optim_golden.json (float64, from the maths alone) and small matrices for
// tests.
#pragma once

#include <fstream>
#include <random>
#include <stdexcept>
#include <vector>

#include <nlohmann/json.hpp>

#include "model/kernels/context.h"

/// A matrix that owns its memory.
struct Matrix {
  int64_t rows = 0, cols = 0;
  std::vector<float> data;

  Matrix() = default;
  Matrix(int64_t rows, int64_t cols) : rows(rows), cols(cols), data(static_cast<size_t>(rows * cols)) {}
  /// Nested lists, row-major.
  explicit Matrix(const nlohmann::json& lists)
      : Matrix(static_cast<int64_t>(lists.size()), static_cast<int64_t>(lists.at(0).size())) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j)
        (*this)(i, j) = lists.at(static_cast<size_t>(i)).at(static_cast<size_t>(j));
  }
  float& operator()(int64_t i, int64_t j) { return data[static_cast<size_t>(i * cols + j)]; }
  float operator()(int64_t i, int64_t j) const { return data[static_cast<size_t>(i * cols + j)]; }
  Tensor tensor() { return {data.data(), Shape{rows, cols}}; }
  Tensor batch() { return {data.data(), Shape{1, rows, cols}}; }
  Matrix transposed() const {
    Matrix t(cols, rows);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) t(j, i) = (*this)(i, j);
    return t;
  }
};

inline Matrix random_matrix(int64_t rows, int64_t cols, uint32_t seed, float scale = 1) {
  Matrix m(rows, cols);
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (float& x : m.data) x = scale * normal(random);
  return m;
}

inline Matrix scaled(Matrix m, double c) {
  for (float& x : m.data) x = static_cast<float>(c * x);
  return m;
}

/// a b in float64.
inline Matrix product(const Matrix& a, const Matrix& b) {
  Matrix c(a.rows, b.cols);
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t j = 0; j < b.cols; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < a.cols; ++k) sum += static_cast<double>(a(i, k)) * b(k, j);
      c(i, j) = static_cast<float>(sum);
    }
  return c;
}

/// <a, b>
inline double inner(const Matrix& a, const Matrix& b) {
  double sum = 0;
  for (size_t i = 0; i < a.data.size(); ++i) sum += static_cast<double>(a.data[i]) * b.data[i];
  return sum;
}

/// The largest |a - b| over the largest |b|.
inline double deviation(const Matrix& a, const Matrix& b) {
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

/// A context on the CPU with plenty of scratch.
struct CpuContext : Context {
  explicit CpuContext(int threads = 2, int64_t scratch_bytes = int64_t{64} << 20) {
    use_cpu(*this, threads);
    scratch.reserve(scratch_bytes);
  }
};
