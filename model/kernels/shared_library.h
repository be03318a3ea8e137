// A shared library that is opened where the program first needs it, and not by the loader before it begins: a
// program with a GPU half starts on machines that have no CUDA, and quickly, since a library of half a
// gigabyte takes the loader longer than `--help` takes us.
#pragma once

#include <string>

class SharedLibrary {
 public:
  /// Opens `file`, "libm.so.6", for the rest of the process: what it started may run until then. It is looked
  /// for in LD_LIBRARY_PATH, in the folders that the Makefile gave the program (-rpath) and in those of the
  /// system. RunError "<need>, <the loader's words>, <advice>".
  SharedLibrary(const std::string& file, const char* need, const char* advice);

  /// The function of that name in the library. RunError as above when it has none, being too old.
  template <typename Function>
  Function* find(const char* name) const {
    return reinterpret_cast<Function*>(address(name));
  }

 private:
  void* address(const char* name) const;

  const char *need_, *advice_;
  void* handle_;
};

/// A member of a struct of functions, beside its SharedLibrary `file`: the function `name`, of the type that
/// the library's header gives it, so that the compiler checks every call as if the library were linked.
#define SHARED_FUNCTION(name) decltype(&::name) const name = file.find<decltype(::name)>(#name)

/// The one struct of functions of this type; opens its library with the first call, in whichever thread.
/// RunError when it cannot; the next call tries again.
template <typename Functions>
const Functions& opened() {
  static const Functions functions;
  return functions;
}
