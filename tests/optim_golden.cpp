#include "tests/optim_golden.h"

#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <stdexcept>

#include "json_text.h"

template <typename T>
MatrixOf<T>::MatrixOf(const nlohmann::json& lists)
    : MatrixOf(static_cast<int64_t>(lists.size()), static_cast<int64_t>(lists.at(0).size())) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j)
      (*this)(i, j) = lists.at(static_cast<size_t>(i)).at(static_cast<size_t>(j));
}
template MatrixOf<float>::MatrixOf(const nlohmann::json& lists);
template MatrixOf<double>::MatrixOf(const nlohmann::json& lists);

Matrix random_matrix(int64_t rows, int64_t cols, uint32_t seed, float scale) {
  Matrix m(rows, cols);
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (float& x : m.data) x = scale * normal(random);
  return m;
}

Matrix64 normal(int64_t rows, int64_t cols, uint32_t seed) {
  return as<double>(random_matrix(rows, cols, seed));
}

Matrix64 identity(int64_t n) {
  Matrix64 m(n, n);
  for (int64_t i = 0; i < n; ++i) m(i, i) = 1;
  return m;
}

const nlohmann::json& optim_golden() {
  static const nlohmann::json numbers = [] {
    std::ifstream file("tests/data/optim_golden.json");
    if (!file)
      throw std::runtime_error("tests/data/optim_golden.json is missing: run the tests from the repository");
    return require_json(std::string(std::istreambuf_iterator<char>(file), {}));
  }();
  return numbers;
}

std::vector<UseDevice> both_devices() {
  std::vector<UseDevice> list = {on_cpu};
  if (kHaveGpu) list.push_back([](Context& ctx) { use_gpu(ctx, 0, DType::f32); });
  return list;
}

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
template void upload(Context& ctx, const Tensor& to, const Matrix& from);
template void upload(Context& ctx, const Tensor& to, const Matrix64& from);

template <typename T>
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
template Matrix download(Context& ctx, const Tensor& from);
template Matrix64 download(Context& ctx, const Tensor& from);
