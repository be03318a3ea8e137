// Opens the libraries of CUDA that the program would open on a GPU, finds in them every function that it
// calls, and calls some that need no GPU; prints a line for each. For tests/check_cuda_start.sh.
#include <cstdio>
#include <exception>

#include "model/kernels/cublaslt_library.h"
#if __has_include(<nccl.h>)
#include "model/kernels/nccl_library.h"
#endif

int main() try {
  const CublasLtLibrary& lt = cublaslt();
  cublasLtMatmulDescOpaque_t product;
  cublasLtMatrixLayoutOpaque_t matrix;
  cublasLtMatmulPreferenceOpaque_t preference;
  for (const cublasStatus_t status :
       {lt.cublasLtMatmulDescInit_internal(&product, sizeof product, CUBLAS_COMPUTE_32F, CUDA_R_32F),
        lt.cublasLtMatrixLayoutInit_internal(&matrix, sizeof matrix, CUDA_R_16BF, 8, 8, 8),
        lt.cublasLtMatmulPreferenceInit_internal(&preference, sizeof preference)})
    if (status != CUBLAS_STATUS_SUCCESS) {
      std::printf("cuBLASLt: %s\n", lt.cublasLtGetStatusString(status));
      return 1;
    }
  std::printf("cuBLASLt %zu\n", lt.cublasLtGetVersion());
#if __has_include(<nccl.h>)
  std::printf("NCCL: %s\n", nccl().ncclGetErrorString(ncclSuccess));
#endif
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return 1;
}
