// The kernels of OpenBLAS on processors that it does not know.
#include "model/kernels/blas_core.h"

#include <gtest/gtest.h>

#include <cstdlib>

namespace {
TEST(BlasCore, WhatAProcessorCouldHaveInstead) {
  EXPECT_EQ(better_blas_core("Prescott", true, true), "SkylakeX");
  EXPECT_EQ(better_blas_core("Prescott", true, false), "Haswell");
  EXPECT_EQ(better_blas_core("Prescott", false, false), "");  // it may be one
  for (const char* known : {"SkylakeX", "Haswell", "Zen", "Cooperlake", "Sandybridge", "neoversen1", ""})
    EXPECT_EQ(better_blas_core(known, true, true), "") << known;
}

// Of this program, on this processor: chosen by whoever set the variable, us or OpenBLAS.
TEST(BlasCore, TheProgramHasTheBest) {
  const bool avx2 = __builtin_cpu_supports("avx2") > 0 && __builtin_cpu_supports("fma") > 0;
  if (!avx2) GTEST_SKIP() << "this processor has no AVX2";
  EXPECT_EQ(better_blas_core(blas_core(), avx2, false), "") << blas_core();
}
}  // namespace
