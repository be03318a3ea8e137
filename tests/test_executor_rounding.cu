// The executor rounds as a GPU may when it is told to (dev/cuda_on_cpu/rounding.h). Empty on a GPU.
#ifdef CUDA_ON_CPU
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>
#include <set>

#include "model/kernels/fast_math.h"
#include "model/kernels/gemm.h"
#include "model/kernels/mma.h"
#include "tests/device_array.h"

namespace {
class ExecutorRounding : public testing::Test {
 protected:
  ~ExecutorRounding() override { cuda_on_cpu::set_rounding(before_); }
  std::mt19937 random_{5};

 private:
  const std::string before_ = cuda_on_cpu::set_rounding("exact");
};

constexpr int kFunctions = 6;
__global__ void functions(float* y, const float* x) {
  const float v = x[threadIdx.x];
  float* to = y + threadIdx.x * kFunctions;
  to[0] = expf(v), to[1] = logf(v), to[2] = rsqrtf(v), to[3] = powf(v, 1.5f), to[4] = __fdividef(1.0f, v);
  to[5] = fast_exp2(v);
}
std::vector<float> values_of_functions(const std::vector<float>& x) {
  const DeviceArray<float> from(x), to(x.size() * kFunctions);
  run_kernel({.grid = 1, .block = static_cast<unsigned>(x.size())}, functions, to.data(), from.data());
  return to.values();
}
int units_apart(float a, float b) {
  return std::abs(std::bit_cast<int32_t>(a) - std::bit_cast<int32_t>(b));
}

TEST_F(ExecutorRounding, FunctionsAreWrongByWhatIsDocumented) {
  std::uniform_real_distribution<float> uniform(0.01f, 20);
  std::vector<float> x(512);
  for (float& v : x) v = uniform(random_);
  const std::vector<float> exact = values_of_functions(x);
  for (size_t i = 0; i < x.size(); ++i) EXPECT_EQ(exact[i * kFunctions], std::exp(x[i]));
  const int bounds[kFunctions] = {2, 1, 2, 4, 2, 2};
  std::set<std::vector<float>> all;
  for (const char* how : {"gpu:0", "gpu:1", "gpu:0"}) {
    cuda_on_cpu::set_rounding(how);
    const std::vector<float> got = values_of_functions(x);
    all.insert(got);
    for (size_t f = 0; f < kFunctions; ++f) {
      int most = 0;
      for (size_t i = f; i < got.size(); i += kFunctions)
        most = std::max(most, units_apart(got[i], exact[i]));
      EXPECT_EQ(most, bounds[f]) << how << ", function " << f;
    }
  }
  EXPECT_EQ(all.size(), 2u) << "the same seed gives the same bits, another one others";
}

// What kernels rely on: the largest of a softmax is 1, what is masked 0.
TEST_F(ExecutorRounding, SpecialValuesStay) {
  const std::vector<float> x{0.0f, 1.0f, -INFINITY, INFINITY, NAN, 200.0f};
  const std::vector<float> exact = values_of_functions(x);
  cuda_on_cpu::set_rounding("gpu:3");
  const std::vector<float> got = values_of_functions(x);
  for (size_t i = 0; i < got.size(); ++i)
    if (!std::isfinite(exact[i]) || exact[i] == 0 || exact[i] == 1) {
      EXPECT_EQ(std::bit_cast<uint32_t>(got[i]), std::bit_cast<uint32_t>(exact[i])) << i;
    }
  EXPECT_EQ(got[0], 1.0f);                // exp(0)
  EXPECT_EQ(got[2 * kFunctions], 0.0f);   // exp(-inf)
  EXPECT_EQ(got[1 * kFunctions + 1], 0);  // log(1)
}

/// d = c + a b, all elements of a and of b equal, by one tensor-core instruction; every element.
__global__ void products_of(float* d, float c, bf16 a, bf16 b) {
  const auto pair = [](bf16 x) { return uint32_t{__bfloat16_as_ushort(x)} * 0x10001u; };
  const uint32_t left[4] = {pair(a), pair(a), pair(a), pair(a)};
  float sums[4] = {c, c, c, c};
  mma_bf16(sums, left, pair(b), pair(b));
  for (int i = 0; i < 4; ++i) d[threadIdx.x * 4 + static_cast<unsigned>(i)] = sums[i];
}
std::vector<float> tensor_core(float c, float a, float b) {
  const DeviceArray<float> d(128);
  run_kernel({.grid = 1, .block = 32}, products_of, d.data(), c, bf16(a), bf16(b));
  return d.values();
}

TEST_F(ExecutorRounding, TensorCoresDropBits) {
  const float small = 0.75f * 0x1p-23f / 16;  // 16 of them are 3/4 of what 1 can hold
  EXPECT_EQ(tensor_core(1, small, 1), std::vector<float>(128, 1 + 0x1p-23f));
  EXPECT_EQ(tensor_core(2, 3, 5), std::vector<float>(128, 242));
  cuda_on_cpu::set_rounding("gpu:0");
  EXPECT_EQ(tensor_core(1, small, 1), std::vector<float>(128, 1));
  EXPECT_EQ(tensor_core(-1, -small, 1), std::vector<float>(128, -1));
  EXPECT_EQ(tensor_core(2, 3, 5), std::vector<float>(128, 242)) << "what needs no rounding is exact";
  EXPECT_EQ(tensor_core(0, INFINITY, 1), std::vector<float>(128, INFINITY));
  EXPECT_TRUE(std::isnan(tensor_core(0, INFINITY, 0)[5]));
}

/// The product of random matrices, by every algorithm of the library, the first suggestion first.
template <typename T>
std::vector<std::vector<T>> products(int64_t M, int64_t N, int64_t K, bool transpose, std::mt19937& random) {
  Context ctx;
  use_gpu(ctx, 0, DType::f32);
  const auto matrix = [&](int64_t size) {
    std::normal_distribution<double> normal;
    std::vector<T> values(static_cast<size_t>(size));
    for (T& value : values) value = static_cast<T>(normal(random));
    return values;
  };
  const DType dtype = dtype_of<T>();
  const DeviceArray<T> a(matrix(M * K)), b(matrix(K * N)), d(matrix(M * N));
  const std::vector<T> before = d.values();
  const Gemm gemm{.M = M,
                  .N = N,
                  .K = K,
                  .transpose_a = transpose,
                  .transpose_b = transpose,
                  .a = {a.data(), dtype, transpose ? M : K},
                  .b = {b.data(), dtype, transpose ? K : N},
                  .c = {d.data(), dtype, N},
                  .d = {d.data(), dtype, N},
                  .beta = 0.5};
  const std::unique_ptr<GemmLibrary> library = gpu::open_gemm_library(*ctx.device);
  std::vector<std::vector<T>> results;
  for (const GemmAlgorithm& algorithm : library->algorithms(gemm, 8)) {
    EXPECT_TRUE(library->accepts(gemm, algorithm));
    CUDA_CHECK(cudaMemcpy(d.data(), before.data(), before.size() * sizeof(T), cudaMemcpyHostToDevice));
    library->run(gemm, algorithm);
    gpu::synchronize(*ctx.device);
    results.push_back(d.values());
  }
  EXPECT_FALSE(library->accepts(gemm, {4}));
  return results;
}

template <typename T>
void check_orders(double tolerance, std::mt19937 random) {
  for (const bool transpose : {false, true})
    for (const int64_t K : {1, 37}) {
      cuda_on_cpu::set_rounding("exact");
      std::mt19937 again = random;
      const auto exact = products<T>(7, 9, K, transpose, again);
      ASSERT_EQ(exact.size(), 1u);
      cuda_on_cpu::set_rounding("gpu:0");
      const auto all = products<T>(7, 9, K, transpose, random);
      ASSERT_EQ(all.size(), 3u);
      for (const std::vector<T>& result : all)
        for (size_t i = 0; i < result.size(); ++i) EXPECT_NEAR(result[i], exact[0][i], tolerance) << i;
      EXPECT_EQ(std::set(all.begin(), all.end()).size(), K > 1 ? 3u : 1u) << "each order has its own bits";
    }
}

TEST_F(ExecutorRounding, ProductsAddInSeveralOrders) {
  check_orders<float>(2e-5, random_);
  check_orders<double>(1e-13, random_);
}

TEST_F(ExecutorRounding, OtherShapesBeginWithOtherOrders) {
  Context ctx;
  use_gpu(ctx, 0, DType::f32);
  const std::unique_ptr<GemmLibrary> library = gpu::open_gemm_library(*ctx.device);
  cuda_on_cpu::set_rounding("gpu:0");
  std::set<uint64_t> first;
  for (int64_t M = 1; M < 20; ++M)
    first.insert(library->algorithms({.M = M, .N = 8, .K = 8, .a = {}, .b = {}, .d = {}}, 1).at(0)[0]);
  EXPECT_EQ(first.size(), 3u);
}

TEST_F(ExecutorRounding, IsNamed) {
  EXPECT_EQ(cuda_on_cpu::set_rounding("gpu:7"), "exact");
  for (const char* how : {"gpu", "gpu:", "gpu:x", "gpu:-1", "wrong", ""})
    EXPECT_THROW(cuda_on_cpu::set_rounding(how), std::invalid_argument) << how;
  EXPECT_EQ(cuda_on_cpu::set_rounding("exact"), "gpu:7");
}
}  // namespace
#endif
