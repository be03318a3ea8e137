// How much arithmetic and traffic training takes, and how long at a machine's rates: the speed of light.
#pragma once

#include "model/config.h"
#include "model/rates.h"

/// Floating-point operations of forward plus backward per token, 2 per multiply-add: 6 for every weight of a
/// matrix product (12 L C^2 + V C of them; embedding look-ups multiply nothing), and 6 L C T for causal
/// attention, half of the full T x T products. Recomputation does not count.
double train_flops_per_token(const ModelConfig& config, int64_t T);

/// Bytes that forward plus backward must move per token outside of matrix products when each operation reads
/// its inputs and writes its outputs once, activations stored as `dtype`: 18 C values per layer (two fused
/// residual additions with layernorm, 4 C each way, and 2 C for the rows of attention's backward pass; the
/// activation belongs to the products), and 2 V for the logits, read once and overwritten by their gradient.
double train_bytes_per_token(const ModelConfig& config, DType dtype);

/// Seconds that `tokens` tokens of training take at these rates: nothing can be faster.
double floor_seconds(const ModelConfig& config, int64_t T, DType dtype, int64_t tokens,
                     const MachineRates& rates);
