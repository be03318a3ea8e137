// How much arithmetic and traffic training takes, and how much of it this machine can do: the speed of light.
#pragma once

#include "model/config.h"
#include "model/kernels/context.h"

/// Floating-point operations of forward plus backward per token, 2 per multiply-add: 6 for every weight of a
/// matrix product (12 L C^2 + V C of them; embedding look-ups multiply nothing), and 6 L C T for causal
/// attention, half of the full T x T products. Recomputation does not count.
double train_flops_per_token(const ModelConfig& config, int64_t T);

/// Bytes that forward plus backward must move per token outside of matrix products when each operation reads
/// its inputs and writes its outputs once, activations stored as `dtype`: 18 C values per layer (two fused
/// residual additions with layernorm, 4 C each way, and 2 C for the rows of attention's backward pass; the
/// activation belongs to the products), and 2 V for the logits, read once and overwritten by their gradient.
double train_bytes_per_token(const ModelConfig& config, DType dtype);

/// What this machine does at best, measured now.
struct MachineRates {
  double flops;  // of a large matrix product in ctx.dtype, per second
  double bytes;  // of a large pass over memory, a copy or in place, read plus written, per second
};
/// Products grow until one takes long enough to be timed; so does a GPU's pass over memory. A CPU's is over
/// two blocks of so many bytes: the default takes little time and memory at the start of a run, and caches
/// hold a part of it; benchmarks take kMoreThanCaches. Takes about 0.1 s, and memory for a moment.
inline constexpr int64_t kMoreThanCaches = int64_t{128} << 20;
MachineRates measure_rates(Context& ctx, int64_t block_bytes = int64_t{16} << 20);

/// Seconds that `tokens` tokens of training take at these rates: nothing can be faster.
double floor_seconds(const ModelConfig& config, int64_t T, DType dtype, int64_t tokens,
                     const MachineRates& rates);
