// What this machine does at best, measured: the rates behind every floor that the program or a benchmark
// prints.
//
// Two rates of memory. Passes in place read and write as many bytes, and every byte that moves is one that
// counts. But a CPU has lanes to memory in each direction, and a pass that reads more than it writes waits
// for the lanes that read, while the others idle: Adam reads 16 bytes a parameter and writes 12, the norm of
// the gradients only reads. So
//
//   seconds of memory = max((read + written) / bytes, read / reads)
#pragma once

#include <algorithm>
#include <limits>

#include "model/kernels/context.h"

/// Bytes per second.
struct MemoryRates {
  double bytes = 0;                                        // of a large pass, read plus written
  double reads = std::numeric_limits<double>::infinity();  // of one that only reads; a GPU's is not measured
};

struct MachineRates {
  double flops = 0;  // of a large matrix product in ctx.dtype, per second
  MemoryRates memory = {};
};

/// What nothing that reads and writes so many bytes can be faster than, in seconds.
inline double memory_seconds(const MemoryRates& rates, double read, double written) {
  return std::max((read + written) / rates.bytes, read / rates.reads);
}

/// Two blocks of memory, and passes over them that can be timed again and again: memory that others use, too,
/// changes its speed within seconds, and what is measured beside it must be measured in turns with it.
class MemoryPasses {
 public:
  /// Blocks of so many bytes: of a CPU with caches that hold less than both, memory's own rates.
  MemoryPasses(Context& ctx, int64_t block_bytes);
  /// The rates of one pass in place over both blocks and of one that reads them; on a GPU, whose memory does
  /// not care, of a copy from one to the other. Waits for the work before it.
  MemoryRates measure();
  int64_t block_bytes() const { return from_.bytes(); }

 private:
  Context& ctx_;
  Tensor from_, to_, scales_;
  Arena arena_{"a measurement"};
};

/// Products grow until one takes long enough to be timed; so does a GPU's pass over memory. A CPU's passes
/// are over two blocks of so many bytes: the default takes little time and memory at the start of a run, and
/// caches hold a part of it; benchmarks take kMoreThanCaches. The best of a few. Takes less than 0.1 s, and
/// memory for a moment.
inline constexpr int64_t kMoreThanCaches = int64_t{128} << 20;
MachineRates measure_rates(Context& ctx, int64_t block_bytes = int64_t{16} << 20);
/// The rate of products alone.
double measure_product_rate(Context& ctx);
