// The GPU's own approximations of functions: thin wrappers of PTX, each beside its CPU model.
#pragma once

#include "model/kernels/cuda.h"

// fast_exp2: 2^x with a relative error of at most 2^-22; results below 2^-126 become 0; 2^-inf = 0, NaN stays
// NaN. Two instructions fewer per call than exp2f, which treats small results with care.
#ifdef __CUDACC__
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
inline float fast_exp2(float x) {
  return x < -126.0f ? 0.0f : exp2f(x);
}
#endif
