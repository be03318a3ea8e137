// What CUDA refuses while a stream is captured into a graph.
//
//   refused                                                              with cudaErrorStreamCapture...
//   waiting for a capturing stream, or for the device while one captures     Unsupported
//   waiting on the host for an event that a capture recorded, timing it      cudaErrorCapturedEvent
//   a capturing stream that waits for an event of another time or place      Isolation
//   allocating, freeing, synchronous copies, unless the capture is relaxed   Unsupported
//   work on the legacy stream beside the capture of a blocking one           Implicit
//   the end of a capture before all that it forked has come back             Unjoined
//   a captured copy from or to pageable host memory                          Unsupported
//
// The last is our own rule: a graph reads and writes such memory when it runs, long after the call. Most of
// these spoil the capture: what follows in it, and its end, is cudaErrorStreamCaptureInvalidated.
#pragma once

#include "dev/cuda_on_cpu/runtime.h"

namespace cuda_on_cpu {

/// Remembers a failure for cudaGetLastError().
cudaError_t report(cudaError_t error);
/// The same, and says on standard error why.
[[gnu::format(printf, 2, 3)]] cudaError_t refuse(cudaError_t error, const char* why, ...);

/// For calls that CUDA calls potentially unsafe during captures.
cudaError_t check_unsafe(const char* call);

}  // namespace cuda_on_cpu
