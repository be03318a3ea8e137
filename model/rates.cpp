#include "model/rates.h"

#include <bit>
#include <chrono>
#include <utility>

#include "model/kernels/cast.h"
#include "model/kernels/matmul.h"
#include "model/kernels/reduce.h"

namespace {
constexpr double kLongEnough = 1e-3;  // seconds of one run that a clock and a launch do not blur

/// How often each is run: the first finds cold caches, and on a GPU the first few a sleeping clock.
int runs_of(const Context& ctx) {
  return ctx.device ? 6 : 3;
}

template <typename Body>
double seconds_of(Context& ctx, Body&& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  ctx.synchronize();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// While it lives, operations are not the program's: no profile counts them.
class Unprofiled {
 public:
  explicit Unprofiled(Context& ctx) : ctx_(ctx), profile_(std::exchange(ctx.profile, nullptr)) {}
  ~Unprofiled() { ctx_.profile = profile_; }
  Unprofiled(const Unprofiled&) = delete;
  Unprofiled& operator=(const Unprofiled&) = delete;

 private:
  Context& ctx_;
  Profile* profile_;
};

/// Where the search for a size that takes long enough begins. On a GPU near its end: each size has its plan
/// made, and the first step waits for that.
int64_t first_side(const Context& ctx) {
  if constexpr (kHaveGpu)
    if (ctx.device) {
      const int64_t per_multiprocessor = ctx.dtype == DType::f32 ? 32 : 64;
      const int64_t side = per_multiprocessor * gpu::info(*ctx.device).multiprocessors;
      return static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(side)));
    }
  return 768;
}

double product_rate(Context& ctx, int64_t size) {
  Tensor a, b, c;
  Arena arena("a measurement");
  for (Tensor* t : {&a, &b, &c}) arena.add(t, ctx.dtype, {size, size});
  arena.allocate(ctx);
  double seconds = std::numeric_limits<double>::infinity();
  for (int run = 0; run < runs_of(ctx); ++run)
    seconds = std::min(seconds,
                       seconds_of(ctx, [&] { matmul(ctx, {.c = c, .a = a, .b = b, .transpose_b = true}); }));
  const double rate = 2.0 * static_cast<double>(size * size * size) / seconds;
  return seconds < kLongEnough && size < 8192 ? product_rate(ctx, 2 * size) : rate;
}

MemoryRates memory_rates(Context& ctx, int64_t block_bytes) {
  constexpr int64_t kMost = int64_t{2} << 30;
  MemoryRates best{.bytes = 0, .reads = 0};
  {
    MemoryPasses passes(ctx, block_bytes);
    for (int run = 0; run < runs_of(ctx); ++run) {
      const MemoryRates rates = passes.measure();
      best.bytes = std::max(best.bytes, rates.bytes);
      best.reads = std::max(best.reads, rates.reads);
    }
  }
  const bool too_short = 2.0 * static_cast<double>(block_bytes) < kLongEnough * best.bytes;
  return ctx.device && too_short && block_bytes < kMost ? memory_rates(ctx, 4 * block_bytes) : best;
}
}  // namespace

MemoryPasses::MemoryPasses(Context& ctx, int64_t block_bytes) : ctx_(ctx) {
  constexpr int64_t kCols = 4096;
  const int64_t rows = block_bytes / (kCols * int64_t{sizeof(float)});
  arena_.add(&from_, {rows, kCols});
  arena_.add(&to_, {rows, kCols});
  arena_.add(&scales_, {rows});
  arena_.allocate(ctx);
}

/// In place, because a copy reads what it overwrites before it does, which nobody counts; and over two
/// blocks, which together no cache holds. The pass that writes comes first: pages that were never written are
/// all the same page of zeros, in a cache, and would be read twice as fast as memory.
MemoryRates MemoryPasses::measure() {
  const Unprofiled unprofiled(ctx_);
  ctx_.synchronize();
  const auto both = 2.0 * static_cast<double>(block_bytes());
  if (ctx_.device) return {.bytes = both / seconds_of(ctx_, [&] { cast(ctx_, {.y = to_, .x = from_}); })};
  const double in_place = seconds_of(ctx_, [&] {
    for (const Tensor& x : {from_, to_}) scale_rows(ctx_, {.y = x, .x = x, .scales = scales_});
  });
  const double reading = seconds_of(ctx_, [&] {
    for (const Tensor& x : {from_, to_}) max_abs(ctx_, x);
  });
  return {.bytes = 2 * both / in_place, .reads = both / reading};
}

double measure_product_rate(Context& ctx) {
  const Unprofiled unprofiled(ctx);
  return product_rate(ctx, first_side(ctx));
}

MachineRates measure_rates(Context& ctx, int64_t block_bytes) {
  return {.flops = measure_product_rate(ctx), .memory = memory_rates(ctx, block_bytes)};
}
