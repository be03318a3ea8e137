// The communicator over MPI: between processes on CPUs; and between GPUs, or several ranks on one GPU, staged
// through page-locked memory. Built where the Makefile found MPI: kHaveMpi in backends.h.
//
// Exchanges are direct: every rank sends to every other one what that one needs and adds what it received
// itself, in the order of the ranks. A thread per process carries them out, one after the other, in the order
// of the calls. While it waits it sleeps, so that the cores stay with the computation. Messages are cut into
// parcels: while one is added the next one travels, and the memory for it stays small.
//
// With a GPU, start_*() waits for the work enqueued so far and copies out, finish() waits for the exchange
// and copies in.
#pragma once

#include <functional>
#include <memory>

#include "model/kernels/context.h"
#include "model/kernels/mpi_process.h"

struct MpiOptions {
  /// Bytes of one message, 8 to 2^30. A rank takes memory for up to 4 (N-1) of them.
  int64_t parcel = 1 << 20;
  /// Called a few times a second while an exchange waits for other ranks, in the communicator's thread. What
  /// it throws ends the exchange; finish() and all later calls throw it.
  std::function<void()> poll = {};
};

/// The communicator of all ranks of `mpi`; one at a time. `ctx` may become another device before the first
/// exchange, and must live as long as the communicator.
std::shared_ptr<Comm> make_mpi_comm(const Context& ctx, std::shared_ptr<MpiProcess> mpi,
                                    MpiOptions options = {});
