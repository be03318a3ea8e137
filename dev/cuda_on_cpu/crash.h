// Says what a segmentation fault means before the program dies of it.
#pragma once

namespace cuda_on_cpu {

/// From now on, in the whole program.
void explain_crashes();
/// Lets the calling OS thread report that a fiber's stack is full. AddressSanitizer does so by itself.
void use_signal_stack();

}  // namespace cuda_on_cpu
