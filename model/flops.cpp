#include "model/flops.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <limits>
#include <utility>

#include "model/kernels/cast.h"
#include "model/kernels/matmul.h"
#include "model/kernels/reduce.h"

double train_flops_per_token(const ModelConfig& config, int64_t T) {
  const auto L = static_cast<double>(config.L), C = static_cast<double>(config.C);
  const double weights = 12.0 * L * C * C + static_cast<double>(config.V) * C;
  return 6.0 * weights + 6.0 * L * C * static_cast<double>(T);
}

double train_bytes_per_token(const ModelConfig& config, DType dtype) {
  const auto L = static_cast<double>(config.L), C = static_cast<double>(config.C);
  return static_cast<double>(dtype_bytes(dtype)) *
         (18.0 * L * C + 2.0 * static_cast<double>(config.padded_V()));
}

namespace {
constexpr double kLongEnough = 1e-3;  // seconds of one run that a clock and a launch do not blur

/// Seconds of the best of a few runs; the first ones find cold caches and a sleeping clock.
template <typename Body>
double best_seconds(Context& ctx, Body&& body) {
  constexpr int kRuns = 6;
  double best = 1e30;
  for (int run = 0; run < kRuns; ++run) {
    const auto start = std::chrono::steady_clock::now();
    body();
    ctx.synchronize();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

/// Where the search for a size that takes long enough begins. On a GPU near its end: each size has its plan
/// made, and the first step waits for that.
int64_t first_side(const Context& ctx) {
  if constexpr (kHaveGpu)
    if (ctx.device) {
      const int64_t per_multiprocessor = ctx.dtype == DType::f32 ? 32 : 64;
      const int64_t side = per_multiprocessor * gpu::info(*ctx.device).multiprocessors;
      return static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(side)));
    }
  return 1024;
}

double product_rate(Context& ctx, int64_t size) {
  Tensor a, b, c;
  Arena arena("a measurement");
  for (Tensor* t : {&a, &b, &c}) arena.add(t, ctx.dtype, {size, size});
  arena.allocate(ctx);
  const double seconds =
      best_seconds(ctx, [&] { matmul(ctx, {.c = c, .a = a, .b = b, .transpose_b = true}); });
  const double rate = 2.0 * static_cast<double>(size * size * size) / seconds;
  return seconds < kLongEnough && size < 8192 ? product_rate(ctx, 2 * size) : rate;
}

/// A GPU's is that of a copy. A CPU reads what a copy overwrites before it does, which nobody counts, so it
/// gets the better of a copy and of passes in place over two blocks in turn, which together no cache holds:
/// in place every byte that moves is one that counts. Pages that were never written are all the same page of
/// zeros, in a cache: a copy from those came out twice as fast as one from memory.
double memory_rate(Context& ctx, int64_t block_bytes) {
  constexpr int64_t kCols = 4096, kMost = int64_t{2} << 30;
  const int64_t rows = block_bytes / (kCols * int64_t{sizeof(float)});
  Tensor from, to, scales;
  Arena arena("a measurement");
  arena.add(&from, {rows, kCols});
  arena.add(&to, {rows, kCols});
  arena.add(&scales, {rows});
  arena.allocate(ctx);
  const auto in_place = [&] {
    scale_rows(ctx, {.y = from, .x = from, .scales = scales});
    scale_rows(ctx, {.y = to, .x = to, .scales = scales});
  };
  const double both = ctx.device ? std::numeric_limits<double>::infinity() : best_seconds(ctx, in_place);
  const double copy = best_seconds(ctx, [&] { cast(ctx, {.y = to, .x = from}); });
  const double seconds = std::min(both / 2, copy);
  const double rate = 2.0 * static_cast<double>(to.bytes()) / seconds;
  return ctx.device && seconds < kLongEnough && block_bytes < kMost ? memory_rate(ctx, 4 * block_bytes)
                                                                    : rate;
}
}  // namespace

MachineRates measure_rates(Context& ctx, int64_t block_bytes) {
  Profile* const profile = std::exchange(ctx.profile, nullptr);  // these calls are not the program's
  const MachineRates rates{.flops = product_rate(ctx, first_side(ctx)),
                           .bytes = memory_rate(ctx, block_bytes)};
  ctx.profile = profile;
  return rates;
}

double floor_seconds(const ModelConfig& config, int64_t T, DType dtype, int64_t tokens,
                     const MachineRates& rates) {
  return static_cast<double>(tokens) * (train_flops_per_token(config, T) / rates.flops +
                                        train_bytes_per_token(config, dtype) / rates.bytes);
}
