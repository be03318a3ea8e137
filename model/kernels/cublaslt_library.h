// The functions of cuBLASLt that we call. The program does not link the library: it is opened when a GPU
// is set up for products.
#pragma once

#include <cublasLt.h>

#include <string>

#include "model/kernels/shared_library.h"

struct CublasLtLibrary {
  const SharedLibrary file{"libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR),
                           "products on a GPU need cuBLASLt",
                           "install a CUDA that has it, or name its folder in LD_LIBRARY_PATH, or use "
                           "--device cpu"};

  SHARED_FUNCTION(cublasLtCreate);
  SHARED_FUNCTION(cublasLtDestroy);
  SHARED_FUNCTION(cublasLtGetVersion);
  SHARED_FUNCTION(cublasLtGetStatusString);
  SHARED_FUNCTION(cublasLtMatmul);
  SHARED_FUNCTION(cublasLtMatmulAlgoCheck);
  SHARED_FUNCTION(cublasLtMatmulAlgoGetHeuristic);
  SHARED_FUNCTION(cublasLtMatmulDescSetAttribute);
  SHARED_FUNCTION(cublasLtMatrixLayoutSetAttribute);
  SHARED_FUNCTION(cublasLtMatmulPreferenceSetAttribute);
  // What its inline functions without "_internal" call, with the size of what they fill.
  SHARED_FUNCTION(cublasLtMatmulDescInit_internal);
  SHARED_FUNCTION(cublasLtMatrixLayoutInit_internal);
  SHARED_FUNCTION(cublasLtMatmulPreferenceInit_internal);
};

inline const CublasLtLibrary& cublaslt() {
  return opened<CublasLtLibrary>();
}
