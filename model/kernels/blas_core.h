// Which of its kernels OpenBLAS uses, LAPACK included, where it does not know the processor.
//
// OpenBLAS chooses by the processor's name when it is loaded. One that came after it is none of its list, and
// gets the kernels for Prescott, a processor of 2004, although its instructions would allow others: OpenBLAS
// 0.3.21 (Debian 12) on an Emerald Rapids multiplies float64 matrices at 26 GFLOP/s instead of 131, and
// oneside takes twice as long. The variable OPENBLAS_CORETYPE decides instead of the name, but is read before
// a program begins; so a program that finds itself in this place sets it and starts itself once more
// (blas_core.cpp, in every program that links it, before main). Where the variable is set already nothing is
// done: set it for tools that would lose the process, like valgrind.
#pragma once

#include <string>

/// The kernels that a processor with these instructions could have, as OPENBLAS_CORETYPE calls them, in place
/// of those of `core`; empty: none better. `core` as openblas_get_corename says it.
std::string better_blas_core(const std::string& core, bool avx2, bool avx512);

/// The name of the kernels in use; empty when BLAS is not OpenBLAS.
std::string blas_core();
