// What stands for cuBLASLt in the executor: host code with the same epilogues, types and refusals. Products
// are oneDNN's sgemm of operands brought to f32, or dgemm of BLAS where all is f64; epilogues are f32;
// results are rounded once, when stored.
#include <oneapi/dnnl/dnnl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>

#include "dev/cuda_on_cpu/device_memory.h"
#include "model/kernels/blas.h"
#include "model/kernels/cuda.h"
#include "model/kernels/gemm.h"

namespace {
/// Rows of a matrix, without gaps. T: float for f32 and bf16, double for f64.
template <typename T>
std::vector<T> load(const GemmMatrix& m, int64_t matrix, int64_t rows, int64_t cols) {
  std::vector<T> values;
  values.reserve(static_cast<size_t>(rows * cols));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t at = matrix * m.stride + r * m.ld + c;
      values.push_back(m.dtype == DType::bf16 ? to_float(static_cast<const Bf16*>(m.data)[at])
                                              : static_cast<const T*>(m.data)[at]);
    }
  return values;
}

float load_at(const void* data, DType dtype, int64_t at) {
  return dtype == DType::bf16 ? to_float(static_cast<const Bf16*>(data)[at])
                              : static_cast<const float*>(data)[at];
}

void store_at(void* data, DType dtype, int64_t at, float value) {
  if (dtype == DType::bf16)
    static_cast<Bf16*>(data)[at] = to_bf16(value);
  else
    static_cast<float*>(data)[at] = value;
}

constexpr float kRoot2OverPi = 0.79788456f, kCubic = 0.044715f;

float gelu(float x) {
  return 0.5f * x * (1 + std::tanh(kRoot2OverPi * (x + kCubic * x * x * x)));
}

float gelu_slope(float x) {
  const float th = std::tanh(kRoot2OverPi * (x + kCubic * x * x * x));
  return 0.5f * (1 + th) + 0.5f * x * (1 - th * th) * kRoot2OverPi * (1 + 3 * kCubic * x * x);
}

class HostLibrary final : public GemmLibrary {
 public:
  explicit HostLibrary(const gpu::Device& device) : device_(device) {}
  std::string name() const override { return "host-1"; }

  // The conditions that cuBLASLt documents for its epilogues, and that vectors of bias are aligned.
  std::vector<GemmAlgorithm> algorithms(const Gemm& g, int most) override {
    const bool gelu = g.epilogue == GemmEpilogue::gelu || g.epilogue == GemmEpilogue::dgelu;
    if (most < 1 || (gelu && g.N % 8 != 0)) return {};
    if (reinterpret_cast<uintptr_t>(g.bias) % 16 != 0 || reinterpret_cast<uintptr_t>(g.aux) % 16 != 0)
      return {};
    return {kOnly};
  }

  bool accepts(const Gemm& g, const GemmAlgorithm& algorithm) override {
    return algorithm == kOnly && !algorithms(g, 1).empty();
  }

  void run(const Gemm& g, const GemmAlgorithm& algorithm) override {
    if (!accepts(g, algorithm) || g.add_to_dbias) throw std::runtime_error("host gemm: not supported");
    CUDA_CHECK(cuda_on_cpu::enqueue("gemm", device_.stream, [g] { multiply_all(g); }));
  }

  double time(const std::function<void()>& body) override {
    const auto start = std::chrono::steady_clock::now();
    body();
    CUDA_CHECK(cudaStreamSynchronize(device_.stream));
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  bool capturing() const override {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    CUDA_CHECK(cudaStreamIsCapturing(device_.stream, &status));
    return status != cudaStreamCaptureStatusNone;
  }

 private:
  const gpu::Device& device_;
  static constexpr GemmAlgorithm kOnly{1};

  static void multiply_all(const Gemm& g) {
    const cuda_on_cpu::DeviceAccess access(cuda_on_cpu::DeviceAccess::From::kernel);
    for (int64_t i = 0; i < g.batch; ++i) g.a.dtype == DType::f64 ? multiply_doubles(g, i) : multiply(g, i);
    if (g.epilogue == GemmEpilogue::dbias) sum_columns(g);
  }

  static bool library(char ta, char tb, const Gemm& g, const float* a, int64_t lda, const float* b,
                      int64_t ldb, float* c) {
    return dnnl_sgemm(ta, tb, g.M, g.N, g.K, static_cast<float>(g.alpha), a, lda, b, ldb,
                      static_cast<float>(g.beta), c, g.N) == dnnl_success;
  }
  static bool library(char ta, char tb, const Gemm& g, const double* a, int64_t lda, const double* b,
                      int64_t ldb, double* c) {
    blas_dgemm(ta, tb, g.M, g.N, g.K, g.alpha, a, lda, b, ldb, g.beta, c, g.N);
    return true;
  }

  /// alpha op(a) op(b) + beta c.
  template <typename T>
  static std::vector<T> product(const Gemm& g, int64_t matrix) {
    const int64_t lda = g.transpose_a ? g.M : g.K, ldb = g.transpose_b ? g.K : g.N;
    const std::vector<T> a = load<T>(g.a, matrix, g.transpose_a ? g.K : g.M, lda);
    const std::vector<T> b = load<T>(g.b, matrix, g.transpose_b ? g.N : g.K, ldb);
    std::vector<T> p =
        g.beta != 0 ? load<T>(g.c, matrix, g.M, g.N) : std::vector<T>(static_cast<size_t>(g.M * g.N));
    if (!library(g.transpose_a ? 'T' : 'N', g.transpose_b ? 'T' : 'N', g, a.data(), lda, b.data(), ldb,
                 p.data()))
      throw std::runtime_error("host gemm: oneDNN's sgemm failed");
    return p;
  }

  static void multiply_doubles(const Gemm& g, int64_t matrix) {
    const std::vector<double> p = product<double>(g, matrix);
    for (int64_t m = 0; m < g.M; ++m)
      std::copy_n(p.data() + m * g.N, g.N, static_cast<double*>(g.d.data) + matrix * g.d.stride + m * g.d.ld);
  }

  static void multiply(const Gemm& g, int64_t matrix) {
    const std::vector<float> p = product<float>(g, matrix);
    for (int64_t m = 0; m < g.M; ++m)
      for (int64_t n = 0; n < g.N; ++n) {
        float value = p[static_cast<size_t>(m * g.N + n)];
        if (g.bias != nullptr) value += load_at(g.bias, g.d.dtype, n);
        if (g.epilogue == GemmEpilogue::gelu) {
          store_at(g.aux, g.d.dtype, m * g.N + n, value);
          value = gelu(value);
        } else if (g.epilogue == GemmEpilogue::dgelu) {
          value *= gelu_slope(load_at(g.aux, g.d.dtype, m * g.N + n));
        }
        store_at(g.d.data, g.d.dtype, matrix * g.d.stride + m * g.d.ld + n, value);
      }
  }

  static void sum_columns(const Gemm& g) {
    const std::vector<float> a = load<float>(g.a, 0, g.K, g.M);
    for (int64_t m = 0; m < g.M; ++m) {
      double sum = 0;
      for (int64_t k = 0; k < g.K; ++k) sum += a[static_cast<size_t>(k * g.M + m)];
      g.dbias[m] = static_cast<float>(sum);
    }
  }
};
}  // namespace

std::unique_ptr<GemmLibrary> gpu::open_gemm_library(Device& device) {
  return std::make_unique<HostLibrary>(device);
}
