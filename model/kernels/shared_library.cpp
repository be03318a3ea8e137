#include "model/kernels/shared_library.h"

#include <dlfcn.h>

#include "error.h"

namespace {
/// The loader's words on what failed last in this thread.
RunError failure(const char* need, const char* advice) {
  return RunError(std::string(need) + ", " + dlerror() + ", " + advice);
}
}  // namespace

SharedLibrary::SharedLibrary(const std::string& file, const char* need, const char* advice)
    : need_(need), advice_(advice), handle_(dlopen(file.c_str(), RTLD_LAZY | RTLD_LOCAL)) {
  if (handle_ == nullptr) throw failure(need_, advice_);
}

void* SharedLibrary::address(const char* name) const {
  void* const found = dlsym(handle_, name);
  if (found == nullptr) throw failure(need_, advice_);
  return found;
}
