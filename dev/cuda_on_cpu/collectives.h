// Operations that several threads of a block do together.
#pragma once

#include "dev/cuda_on_cpu/block.h"

namespace cuda_on_cpu {

/// A warp operation: whether it also orders the memory accesses of its lanes, as __syncwarp and the .sync
/// matrix instructions do and shuffles do not.
enum class Orders : bool { nothing, memory };

/// Brings `bytes` bytes and waits until every lane of the mask has called. Lanes may read what the others
/// brought until they enter their next operation. `finish` is called once, by the last lane.
const Deposits& meet(unsigned mask, const Operation& operation, Orders orders, const void* mine, size_t bytes,
                     void (*finish)(Deposits&) = nullptr);

/// Barrier `id`: waits until `count` threads have come; 0 means all that have not returned. Returns the sum
/// of everybody's vote.
int barrier(int id, int count, const Operation& operation, int vote = 0);
/// Counts as having come to barrier `id`, and goes on.
void arrive(int id, int count, const Operation& operation);
/// Waits for the 128 threads of the caller's warpgroup.
void warpgroup_barrier(const Operation& operation);
/// Barrier 0 after a thread has returned: those that are left may be complete.
void release_barrier_of_all(Block& block);

/// Waits until a condition holds that other threads, or copies by the hardware, make true.
void wait_until(const std::function<bool()>& condition, const Operation& operation,
                std::function<std::string()> explain);

/// Offset of an address inside the block's dynamic shared memory, which stands for its 32-bit address. Fails
/// when it is elsewhere.
uint32_t shared_offset(const void* address, const char* operation);

}  // namespace cuda_on_cpu
