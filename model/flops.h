// How much arithmetic a token costs, and how much this machine can do.
#pragma once

#include "model/config.h"
#include "model/kernels/context.h"

/// Floating-point operations of forward plus backward per token, 2 per multiply-add: 6 for every weight of a
/// matrix product (12 L C^2 + V C of them; embedding look-ups multiply nothing), and 6 L C T for causal
/// attention, half of the full T x T products. Recomputation does not count.
double train_flops_per_token(const ModelConfig& config, int64_t T);

/// The fp32 matrix-product rate of this machine in FLOP/s, measured now: the best of a few 1024^3 products.
/// Takes about 50 ms; needs 12 MiB for a moment.
double measure_peak_flops(Context& ctx);
