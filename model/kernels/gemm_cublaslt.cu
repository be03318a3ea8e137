// Matrix products by cuBLASLt. The one file that uses this library (cublaslt_library.h opens it); the
// executor has gemm_host.cpp in its place.
//
// cuBLASLt is column-major: it sees our row-major matrix (rows, cols) as its transpose (cols, rows). So we
// ask for d^T = op(b)^T op(a)^T: its A is our b, its B our a, its rows are our columns N. Its bias runs along
// its rows, which is what we need; its "bias gradient of B" sums our a.
#include <algorithm>
#include <array>
#include <bit>
#include <source_location>
#include <stdexcept>

#include "model/kernels/cublaslt_library.h"
#include "model/kernels/cuda.h"
#include "model/kernels/gemm.h"

namespace {
constexpr size_t kWorkspace = size_t{32} << 20;  // what NVIDIA recommends for Hopper

std::string describe(const Gemm& g) {
  const auto size = [](int64_t n) { return std::to_string(n); };
  return "product of M=" + size(g.M) + " N=" + size(g.N) + " K=" + size(g.K) + " batch=" + size(g.batch) +
         " " + dtype_name(g.a.dtype) + " to " + dtype_name(g.d.dtype) + " epilogue " +
         size(static_cast<int64_t>(g.epilogue));
}

/// Throws unless the call for product `g` succeeded.
void lt_check(cublasStatus_t status, const char* call, const Gemm& g,
              std::source_location where = std::source_location::current()) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw std::runtime_error(std::string(call) + ": " + cublaslt().cublasLtGetStatusString(status) + ", " +
                           describe(g) + ", " + where.file_name() + ":" + std::to_string(where.line()) +
                           ", set CUBLASLT_LOG_LEVEL=2 for cuBLASLt's own words");
}

cudaDataType_t type_of(DType dtype) {
  return dtype == DType::bf16 ? CUDA_R_16BF : dtype == DType::f64 ? CUDA_R_64F : CUDA_R_32F;
}

/// cuBLASLt's description of a product, on the stack: made anew for each call, it is cheap.
class Description {
 public:
  explicit Description(const Gemm& g) : gemm_(g), c_(g.beta != 0 ? g.c : g.d) {
    // CUBLAS_COMPUTE_32F: f32 sums, and no TF32 for products of f32. The second type is that of alpha, beta.
    const bool doubles = g.a.dtype == DType::f64;
    lt_check(cublaslt().cublasLtMatmulDescInit_internal(&op, sizeof op,
                                                        doubles ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F,
                                                        doubles ? CUDA_R_64F : CUDA_R_32F),
             "cublasLtMatmulDescInit", gemm_);
    set(CUBLASLT_MATMUL_DESC_TRANSA, int32_t{g.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N});
    set(CUBLASLT_MATMUL_DESC_TRANSB, int32_t{g.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N});
    set_epilogue(g);
    layout(&a, g.b, g.transpose_b ? g.N : g.K, g.transpose_b ? g.K : g.N, g.batch);
    layout(&b, g.a, g.transpose_a ? g.K : g.M, g.transpose_a ? g.M : g.K, g.batch);
    layout(&c, c_, g.M, g.N, g.batch);
    layout(&d, g.d, g.M, g.N, g.batch);
  }
  /// What stands for C; with beta = 0 it is not read, but must be there.
  const void* c_data() const { return c_.data; }

  cublasLtMatmulDescOpaque_t op;
  cublasLtMatrixLayoutOpaque_t a, b, c, d;

 private:
  template <typename Value>
  void set(cublasLtMatmulDescAttributes_t attribute, const Value& value) {
    lt_check(cublaslt().cublasLtMatmulDescSetAttribute(&op, attribute, &value, sizeof(value)),
             "cublasLtMatmulDescSetAttribute", gemm_);
  }

  // Types of bias, aux and dbias are left at their default, the type of D, which is what gemm.h says.
  void set_epilogue(const Gemm& g) {
    uint32_t epilogue = g.bias != nullptr ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    if (g.bias != nullptr) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, g.bias);
    switch (g.epilogue) {
      case GemmEpilogue::none:
        break;
      case GemmEpilogue::gelu:  // the tanh form, as ours
        epilogue = g.bias != nullptr ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
        break;
      case GemmEpilogue::dgelu:
        epilogue = CUBLASLT_EPILOGUE_DGELU;
        break;
      case GemmEpilogue::dbias:
        epilogue = CUBLASLT_EPILOGUE_BGRADB;
        set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<void*>(g.dbias));
        break;
    }
    if (g.epilogue == GemmEpilogue::gelu || g.epilogue == GemmEpilogue::dgelu) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, g.aux);
      set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, g.N);
    }
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
  }

  void layout(cublasLtMatrixLayout_t to, const GemmMatrix& m, int64_t rows, int64_t cols, int64_t batch) {
    lt_check(
        cublaslt().cublasLtMatrixLayoutInit_internal(
            to, sizeof *to, type_of(m.dtype), static_cast<uint64_t>(cols), static_cast<uint64_t>(rows), m.ld),
        "cublasLtMatrixLayoutInit", gemm_);
    if (batch == 1) return;
    const auto count = static_cast<int32_t>(batch);
    lt_check(cublaslt().cublasLtMatrixLayoutSetAttribute(to, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count,
                                                         sizeof(count)),
             "cublasLtMatrixLayoutSetAttribute", gemm_);
    lt_check(cublaslt().cublasLtMatrixLayoutSetAttribute(to, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                                         &m.stride, sizeof(m.stride)),
             "cublasLtMatrixLayoutSetAttribute", gemm_);
  }

  const Gemm& gemm_;
  GemmMatrix c_;
};

class CublasLt final : public GemmLibrary {
 public:
  explicit CublasLt(gpu::Device& device) : device_(device) {
    if (const cublasStatus_t status = cublaslt().cublasLtCreate(&handle_); status != CUBLAS_STATUS_SUCCESS)
      throw std::runtime_error(std::string("cublasLtCreate: ") + cublaslt().cublasLtGetStatusString(status) +
                               ", GPU " + std::to_string(device.index) +
                               ", check that the driver and libcublasLt are of one CUDA version");
    workspace_ = gpu::allocate(device, kWorkspace, "the workspace of matrix products");
    CUDA_CHECK(cudaEventCreate(&begin_));
    CUDA_CHECK(cudaEventCreate(&end_));
  }
  ~CublasLt() override {
    gpu::release(device_, workspace_);  // waits for what uses it
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
    cublaslt().cublasLtDestroy(handle_);
  }

  std::string name() const override { return "cublasLt-" + std::to_string(cublaslt().cublasLtGetVersion()); }

  std::vector<GemmAlgorithm> algorithms(const Gemm& g, int most) override {
    Description product(g);
    cublasLtMatmulPreferenceOpaque_t preference;
    lt_check(cublaslt().cublasLtMatmulPreferenceInit_internal(&preference, sizeof preference),
             "cublasLtMatmulPreferenceInit", g);
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
      lt_check(cublaslt().cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof(value)),
               "cublasLtMatmulPreferenceSetAttribute", g);
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{kWorkspace});
    // Parts of a sum are added in f32 and in one order: neither in the output's type, nor in place.
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, uint32_t{CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, gemm_alignment(g.b.data));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, gemm_alignment(g.a.data));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, gemm_alignment(product.c_data()));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, gemm_alignment(g.d.data));
    std::array<cublasLtMatmulHeuristicResult_t, 32> results;  // no vector: nvcc 13 fails on a nameless type
    int found = 0;
    const cublasStatus_t status = cublaslt().cublasLtMatmulAlgoGetHeuristic(
        handle_, &product.op, &product.a, &product.b, &product.c, &product.d, &preference, std::min(most, 32),
        results.data(), &found);
    // What an epilogue may ask of sizes and pointers is not all documented; without one we ask nothing odd.
    const bool plain = g.epilogue == GemmEpilogue::none && g.bias == nullptr;
    if (status == CUBLAS_STATUS_NOT_SUPPORTED || (status == CUBLAS_STATUS_INVALID_VALUE && !plain)) return {};
    lt_check(status, "cublasLtMatmulAlgoGetHeuristic", g);
    std::vector<GemmAlgorithm> algorithms;
    for (int i = 0; i < found; ++i)
      if (const auto& result = results[static_cast<size_t>(i)]; result.state == CUBLAS_STATUS_SUCCESS)
        algorithms.push_back(std::bit_cast<GemmAlgorithm>(result.algo));
    return algorithms;
  }

  bool accepts(const Gemm& g, const GemmAlgorithm& algorithm) override {
    Description product(g);
    const auto algo = std::bit_cast<cublasLtMatmulAlgo_t>(algorithm);
    cublasLtMatmulHeuristicResult_t result{};
    return cublaslt().cublasLtMatmulAlgoCheck(handle_, &product.op, &product.a, &product.b, &product.c,
                                              &product.d, &algo, &result) == CUBLAS_STATUS_SUCCESS &&
           result.workspaceSize <= kWorkspace;
  }

  void run(const Gemm& g, const GemmAlgorithm& algorithm) override {
    Description product(g);
    const auto algo = std::bit_cast<cublasLtMatmulAlgo_t>(algorithm);
    const auto alpha = static_cast<float>(g.alpha), beta = static_cast<float>(g.beta);
    const bool doubles = g.a.dtype == DType::f64;
    const void *scale = &alpha, *keep = &beta;
    if (doubles) scale = &g.alpha, keep = &g.beta;
    lt_check(cublaslt().cublasLtMatmul(handle_, &product.op, scale, g.b.data, &product.a, g.a.data,
                                       &product.b, keep, product.c_data(), &product.c, g.d.data, &product.d,
                                       &algo, workspace_, kWorkspace, device_.stream),
             "cublasLtMatmul", g);
  }

  // While the GPU clears the workspace, which nothing needs, the host enqueues the work: the events see no
  // gap before the first kernel, which would hide what small products take. Some of the L2 is evicted, too,
  // as in a step.
  double time(const std::function<void()>& body) override {
    for (int round = 0; round < 2; ++round)
      CUDA_CHECK(cudaMemsetAsync(workspace_, 0, kWorkspace, device_.stream));
    CUDA_CHECK(cudaEventRecord(begin_, device_.stream));
    body();
    CUDA_CHECK(cudaEventRecord(end_, device_.stream));
    CUDA_CHECK(cudaEventSynchronize(end_));
    float milliseconds = 0;
    CUDA_CHECK(cudaEventElapsedTime(&milliseconds, begin_, end_));
    return milliseconds / 1e3;
  }

  bool capturing() const override {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    CUDA_CHECK(cudaStreamIsCapturing(device_.stream, &status));
    return status != cudaStreamCaptureStatusNone;
  }

 private:
  gpu::Device& device_;
  cublasLtHandle_t handle_ = nullptr;
  char* workspace_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};
}  // namespace

std::unique_ptr<GemmLibrary> gpu::open_gemm_library(Device& device) {
  return std::make_unique<CublasLt>(device);
}
