// Matrix products on a GPU: one call, a library behind it, and the choice of the fastest way.
//
//   p = alpha op(a) op(b) + beta c + bias          for each matrix of a batch, all row-major, sums in f32, or
//   f64
//
//   epilogue none    d = p
//            gelu    aux = p,  d = gelu(p)
//            dgelu   d = p * gelu'(aux)
//            dbias   d = p,    dbias[m] (+)= sum over k of op(a)[m][k]
//
// f64 is all f64 (a, b, c, d and the sums), and has neither bias nor epilogue.
//
// The library is cuBLASLt (gemm_cublaslt.cu), or host code in the executor (dev/cuda_on_cpu/gemm_host.cpp).
//
// A *plan* says how a product of one shape is computed: by which algorithm of the library, and for epilogues
// whether the library does both at once (fused) or a plain product and our own kernels follow. Without a
// cache file the plan is the library's first suggestion, and epilogues are kernels of ours. With one, the
// first product of a shape times the library's suggestions, fused and apart, for some 20 ms; the fastest is
// kept in the file, so that the next run computes the same bits without timing. Other GPUs, or another
// version of the library, use other files.
//
// Timing writes to the product's own outputs, which the product itself then overwrites, or to temporary
// memory where they are added to. It never happens while the stream is captured into a CUDA graph: run the
// first step uncaptured, or a new shape gets the library's first suggestion for the rest of the run.
//
// Plain C++, so that set-up code may include it too.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "model/kernels/context.h"

struct GemmMatrix {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t ld = 0;      // elements from one row to the next
  int64_t stride = 0;  // elements from one matrix of the batch to the next
};

enum class GemmEpilogue : uint8_t { none, gelu, dgelu, dbias };

struct Gemm {
  int64_t batch = 1;
  int64_t M, N, K;             // op(a) (M, K), op(b) (K, N), c and d (M, N)
  bool transpose_a = false;    // a is stored as (K, M)
  bool transpose_b = false;    // b is stored as (N, K)
  GemmMatrix a, b;             // both f32, both bf16 or both f64; may overlap c
  GemmMatrix c = {};           // read when beta != 0, otherwise ignored; the layout and dtype of d
  GemmMatrix d;                // written; the dtype of a, or f32 from bf16. May be c, overlaps nothing else
  double alpha = 1, beta = 0;  // rounded to f32 unless all is f64
  const void* bias = nullptr;  // (N), of d's dtype
  GemmEpilogue epilogue = GemmEpilogue::none;
  // Only for the epilogues that name them:
  void* aux = nullptr;        // (M, N) without gaps, of d's dtype
  float* dbias = nullptr;     // (M)
  bool add_to_dbias = false;  // instead of overwriting it
};

/// What a library may assume of a pointer: a multiple of 256 bytes, of 16, or less. Plans depend on it.
inline uint32_t gemm_alignment(const void* pointer) {
  for (uint32_t bytes : {256, 16, 8, 4})
    if (reinterpret_cast<uintptr_t>(pointer) % bytes == 0) return bytes;
  return 2;
}

/// One of a library's ways to compute a product: bits that only the library understands.
using GemmAlgorithm = std::array<uint64_t, 8>;

struct GemmOptions {
  /// Where plans are kept. Empty: nothing is timed, so that equal programs choose equally.
  std::string cache_file = {};
  /// Epilogues: as the times say (apart when nothing is timed), or always fused or apart, for tests.
  enum class Epilogues : uint8_t { measured, fused, apart } epilogues = Epilogues::measured;
};

/// A library of matrix products on one device. Failures are std::runtime_error.
class GemmLibrary {
 public:
  GemmLibrary() = default;
  virtual ~GemmLibrary() = default;
  GemmLibrary(const GemmLibrary&) = delete;
  GemmLibrary& operator=(const GemmLibrary&) = delete;

  /// With the version: "cublasLt-130100".
  virtual std::string name() const = 0;
  /// Up to `most` ways to compute this product, epilogue and all, the likely fastest first; none when the
  /// library cannot.
  virtual std::vector<GemmAlgorithm> algorithms(const Gemm& gemm, int most) = 0;
  /// Whether an algorithm that was read from a file can compute this product.
  virtual bool accepts(const Gemm& gemm, const GemmAlgorithm& algorithm) = 0;
  /// Enqueues the product. add_to_dbias is not for libraries: it is false.
  virtual void run(const Gemm& gemm, const GemmAlgorithm& algorithm) = 0;
  /// Seconds that the device takes for what `body` enqueues.
  virtual double time(const std::function<void()>& body) = 0;
  /// Whether the device's stream is being captured into a graph, so that nothing can be timed.
  virtual bool capturing() const = 0;
};

namespace gpu {
/// Enqueues a product. The epilogue dbias takes scratch: dbias_scratch_bytes in matmul.h.
void gemm(Context& ctx, const Gemm& gemm);

/// From the next product on. Forgets all plans, and reads those of the cache file.
void set_gemm_options(Context& ctx, const GemmOptions& options);
/// ${XDG_CACHE_HOME:-$HOME/.cache}/anthology/gemm-<GPU>-<library>.json; empty when there is no such folder.
std::string default_gemm_cache(Context& ctx);

/// The library of this binary. RunError where cuBLASLt is not installed.
std::unique_ptr<GemmLibrary> open_gemm_library(Device& device);
/// In place of that one; for tests.
void use_gemm_library(Context& ctx, std::unique_ptr<GemmLibrary> library);
}  // namespace gpu
