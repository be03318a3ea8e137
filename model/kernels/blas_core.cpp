#include "model/kernels/blas_core.h"

#include <dlfcn.h>
#include <sys/auxv.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>

namespace {
constexpr const char* kVariable = "OPENBLAS_CORETYPE";

bool has_avx2() {
  return __builtin_cpu_supports("avx2") > 0 && __builtin_cpu_supports("fma") > 0;
}
/// Those that the kernels for Skylake-X consist of.
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") > 0 && __builtin_cpu_supports("avx512bw") > 0 &&
         __builtin_cpu_supports("avx512dq") > 0 && __builtin_cpu_supports("avx512vl") > 0;
}

/// glibc hands a program's arguments to its constructors as it does to main. Libraries are initialised
/// before, OpenBLAS among them.
__attribute__((constructor)) void start_with_better_blas(int, char** arguments, char**) {
  if (std::getenv(kVariable) != nullptr || getauxval(AT_BASE) == 0) return;  // 0: ld.so was asked to load us
  const std::string core = better_blas_core(blas_core(), has_avx2(), has_avx512());
  if (core.empty()) return;
  setenv(kVariable, core.c_str(), /*overwrite=*/0);
  execv("/proc/self/exe", arguments);
  unsetenv(kVariable);  // it could not be started again: the slow kernels, then
}
}  // namespace

std::string better_blas_core(const std::string& core, bool avx2, bool avx512) {
  constexpr const char* kOld[] = {"Prescott", "Core2", "Generic", "Unknown"};
  if (std::ranges::find(kOld, core) == std::end(kOld)) return {};
  if (avx512) return "SkylakeX";
  return avx2 ? "Haswell" : "";
}

std::string blas_core() {
  const auto name = reinterpret_cast<char* (*)()>(dlsym(RTLD_DEFAULT, "openblas_get_corename"));
  return name != nullptr ? name() : "";
}
