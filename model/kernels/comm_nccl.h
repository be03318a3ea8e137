// The communicator over NCCL: between GPUs, one rank on each. Built with CUDA where nccl.h lies beside nvcc:
// kHaveNccl in backends.h.
//
// Exchanges run on a stream of their own, behind and before the compute stream by events, so nothing waits on
// the host, and a step with exchanges can be a CUDA graph as long as it finishes what it starts. Parts of
// equal size that follow each other in memory, one for each rank in turn, become one reduce-scatter or
// all-gather in place; the others a reduction to, or a broadcast from, each owner, in one group. So the parts
// must lie in memory the same way on all ranks, as arenas see to.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "model/kernels/context.h"

/// The GPU of ctx within its machine: two ranks with the same one cannot both join.
std::string nccl_device(const Context& ctx);
/// 128 bytes that name a new communicator; rank 0 hands them to the others.
std::string nccl_unique_id();
/// Waits for all ranks. RunError with NCCL's words. `poll` is called while the host waits for an exchange;
/// what it throws ends the wait. `ctx` must be on its GPU and live as long as the communicator.
///
/// Times (busy, exposed) are those of exchanges that were not captured in a graph.
std::shared_ptr<Comm> make_nccl_comm(const Context& ctx, const std::string& id, int rank, int size,
                                     std::function<void()> poll = {});
