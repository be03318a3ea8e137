// The executable's symbol table: names for messages, and where a kernel's static shared memory is. Everything
// here is empty for a stripped program.
#pragma once

#include <cstddef>
#include <string>

namespace cuda_on_cpu {

/// The function that begins at an address, as it is written in C++ ("gelu_kernel<float, 4>"); its address in
/// hex when unknown.
std::string function_name(const void* function);
/// The function that a code address lies in.
std::string function_around(const void* code);
/// Bytes of the static __shared__ variables of a kernel.
size_t static_shared_bytes(const void* kernel);
/// Fills the static __shared__ variables of a kernel with NaN, on the calling OS thread.
void poison_static_shared(const void* kernel);

}  // namespace cuda_on_cpu
