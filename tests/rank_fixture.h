// Tests that run on several ranks over MPI when mpirun starts them, on GPUs over NCCL with RANKS_OVER_NCCL in
// the environment; without mpirun on one, over NCCL on a GPU.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <memory>
#include <stdexcept>

#include "model/kernels/backends.h"
#include "model/kernels/comm_mpi.h"
#include "model/kernels/comm_nccl.h"
#include "model/kernels/context.h"

class RankTest : public testing::Test {
 protected:
  /// Gives ctx_ a communicator with messages of up to `parcel` bytes. Without a `watch`, a wait of half a
  /// minute is a failure of the test, so that no mistake can hang it.
  void join([[maybe_unused]] int64_t parcel, [[maybe_unused]] std::function<void()> watch = {}) {
    ctx_.comm = std::make_shared<Comm>();  // MPI serves one communicator at a time
    const bool launched = std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr;
    if constexpr (kHaveNccl)
      if (!launched && ctx_.where == Where::gpu) ctx_.comm = make_nccl_comm(ctx_, nccl_unique_id(), 0, 1);
    if (!launched) return;
    if constexpr (kHaveMpi) {
      if constexpr (kHaveNccl)
        if (ctx_.where == Where::gpu && over_nccl()) {
          const std::string id = process()->gather(process()->rank() == 0 ? nccl_unique_id() : "").front();
          ctx_.comm = make_nccl_comm(ctx_, id, process()->rank(), process()->size(), watch);
          return;
        }
      if (!watch)
        watch = [looks = 0]() mutable {
          if (++looks > 150) throw std::runtime_error("the other ranks do not answer");
        };
      ctx_.comm = make_mpi_comm(ctx_, process(), {.parcel = parcel, .poll = watch});
    } else {
      throw std::runtime_error("these tests were built without MPI");
    }
  }
  Comm& comm() const { return *ctx_.comm; }
  /// The GPU of this rank: NCCL wants one for each, over MPI they share the first.
  static int gpu_of_rank() {
    const char* local = std::getenv("OMPI_COMM_WORLD_LOCAL_RANK");
    return over_nccl() && local != nullptr ? std::atoi(local) : 0;
  }

  /// Waits for all ranks, over MPI.
  static void meet() {
    if constexpr (kHaveMpi) process()->gather("");
  }

  Context ctx_;

 private:
  static bool over_nccl() { return std::getenv("RANKS_OVER_NCCL") != nullptr; }
  static std::shared_ptr<MpiProcess> process() {
    static const auto process = std::make_shared<MpiProcess>();  // ends with the program, in its main thread
    return process;
  }
};
