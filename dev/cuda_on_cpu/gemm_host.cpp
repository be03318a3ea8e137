// What stands for cuBLASLt in the executor: host code with the same epilogues, types and refusals. Products
// are oneDNN's sgemm of operands brought to f32, or dgemm of BLAS where all is f64; epilogues are f32;
// results are rounded once, when stored. One algorithm, or those below (rounding.h).
#include <oneapi/dnnl/dnnl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>

#include "dev/cuda_on_cpu/device_memory.h"
#include "dev/cuda_on_cpu/rounding.h"
#include "model/kernels/blas.h"
#include "model/kernels/cuda.h"
#include "model/kernels/gemm.h"

namespace {
/// In which order a product adds: upwards, downwards, the second half of the sums onto the first.
enum class Adds : uint64_t { upwards = 1, downwards, by_halves };
constexpr int kOrders = 3;

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
    const uint32_t seed = cuda_on_cpu::rounding_seed();
    if (seed == 0) return {{static_cast<uint64_t>(Adds::upwards)}};
    uint32_t shape = seed;
    for (const int64_t size : {g.batch, g.M, g.N, g.K})
      shape = cuda_on_cpu::mixed(shape, static_cast<uint32_t>(size));
    std::vector<GemmAlgorithm> list;
    for (int i = 0; i < std::min(most, kOrders); ++i)
      list.push_back({1 + (shape + static_cast<uint32_t>(i)) % kOrders});
    return list;
  }

  bool accepts(const Gemm& g, const GemmAlgorithm& algorithm) override {
    const std::vector<GemmAlgorithm> all = algorithms(g, kOrders);
    return std::ranges::find(all, algorithm) != all.end();
  }

  void run(const Gemm& g, const GemmAlgorithm& algorithm) override {
    if (!accepts(g, algorithm) || g.add_to_dbias) throw std::runtime_error("host gemm: not supported");
    const auto adds = static_cast<Adds>(algorithm[0]);
    CUDA_CHECK(cuda_on_cpu::enqueue("gemm", device_.stream, [g, adds] { multiply_all(g, adds); }));
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

  static void multiply_all(const Gemm& g, Adds adds) {
    const cuda_on_cpu::DeviceAccess access(cuda_on_cpu::DeviceAccess::From::kernel);
    for (int64_t i = 0; i < g.batch; ++i)
      g.a.dtype == DType::f64 ? multiply_doubles(g, i, adds) : multiply(g, i, adds);
    if (g.epilogue == GemmEpilogue::dbias) sum_columns(g);
  }

  /// An operand, whose sums run along its rows or its columns.
  template <typename T>
  struct Operand {
    std::vector<T> values;
    int64_t ld;
    bool along_rows;

    char letter(char if_rows, char if_cols) const { return along_rows ? if_rows : if_cols; }
    const T* from(int64_t k) const { return values.data() + (along_rows ? k : k * ld); }
    void turn_around() {
      if (!along_rows) {
        const int64_t rows = std::ssize(values) / ld;
        for (int64_t k = 0; k < rows / 2; ++k)
          std::swap_ranges(values.begin() + k * ld, values.begin() + (k + 1) * ld,
                           values.begin() + (rows - 1 - k) * ld);
      } else {
        for (auto row = values.begin(); row != values.end(); row += ld) std::reverse(row, row + ld);
      }
    }
  };

  static void library(char ta, char tb, const Gemm& g, int64_t K, const float* a, int64_t lda, const float* b,
                      int64_t ldb, double beta, float* c) {
    if (dnnl_sgemm(ta, tb, g.M, g.N, K, static_cast<float>(g.alpha), a, lda, b, ldb, static_cast<float>(beta),
                   c, g.N) != dnnl_success)
      throw std::runtime_error("host gemm: oneDNN's sgemm failed");
  }
  static void library(char ta, char tb, const Gemm& g, int64_t K, const double* a, int64_t lda,
                      const double* b, int64_t ldb, double beta, double* c) {
    blas_dgemm(ta, tb, g.M, g.N, K, g.alpha, a, lda, b, ldb, beta, c, g.N);
  }

  /// alpha op(a) op(b) + beta c.
  template <typename T>
  static std::vector<T> product(const Gemm& g, int64_t matrix, Adds adds) {
    Operand<T> a{.values = {}, .ld = g.transpose_a ? g.M : g.K, .along_rows = !g.transpose_a};
    Operand<T> b{.values = {}, .ld = g.transpose_b ? g.K : g.N, .along_rows = g.transpose_b};
    a.values = load<T>(g.a, matrix, g.transpose_a ? g.K : g.M, a.ld);
    b.values = load<T>(g.b, matrix, g.transpose_b ? g.N : g.K, b.ld);
    if (adds == Adds::downwards) a.turn_around(), b.turn_around();
    std::vector<T> p =
        g.beta != 0 ? load<T>(g.c, matrix, g.M, g.N) : std::vector<T>(static_cast<size_t>(g.M * g.N));
    const int64_t first = adds == Adds::by_halves ? (g.K + 1) / 2 : g.K;
    const auto add = [&](int64_t from, int64_t to, double beta) {
      if (from < to)
        library(a.letter('N', 'T'), b.letter('T', 'N'), g, to - from, a.from(from), a.ld, b.from(from), b.ld,
                beta, p.data());
    };
    add(0, first, g.beta);
    add(first, g.K, 1);
    return p;
  }

  static void multiply_doubles(const Gemm& g, int64_t matrix, Adds adds) {
    const std::vector<double> p = product<double>(g, matrix, adds);
    for (int64_t m = 0; m < g.M; ++m)
      std::copy_n(p.data() + m * g.N, g.N, static_cast<double*>(g.d.data) + matrix * g.d.stride + m * g.d.ld);
  }

  static void multiply(const Gemm& g, int64_t matrix, Adds adds) {
    const std::vector<float> p = product<float>(g, matrix, adds);
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
