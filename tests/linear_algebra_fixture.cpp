#include "tests/linear_algebra_fixture.h"

#include <algorithm>
#include <cmath>

Matrix64 symmetric(const std::vector<double>& values, uint32_t seed) {
  Bench host({on_cpu, DType::f64});
  const auto n = static_cast<int64_t>(values.size());
  const Matrix64 q = host.orthonormal(normal(n, n, seed));
  Matrix64 scaled_columns = q;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) scaled_columns(i, j) *= values[static_cast<size_t>(j)];
  Matrix64 a = product(scaled_columns, q.transposed());
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < i; ++j) a(i, j) = a(j, i);
  return a;
}

bool all_nan(const Matrix64& m) {
  return std::all_of(m.data.begin(), m.data.end(), [](double x) { return std::isnan(x); });
}

std::vector<Setting> settings() {
  std::vector<Setting> all;
  for (const DType dtype : {DType::f32, DType::f64})
    for (const UseDevice use : both_devices()) all.push_back({use, dtype});
  return all;
}

std::string setting_name(const testing::TestParamInfo<Setting>& info) {
  return std::string(info.param.use == on_cpu ? "Cpu" : "Gpu") +
         (info.param.dtype == DType::f64 ? "F64" : "F32");
}
