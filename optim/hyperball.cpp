#include "optim/hyperball.h"

#include "model/kernels/reduce_plan.h"
#include "model/kernels/sums.h"
#include "optim/move.h"

namespace {
constexpr int64_t kGrain = 8192;  // elements: below that, starting a thread costs more than it gives

template <typename T>
BallSums sums_of(const Context& ctx, const Hyperball& a) {
  const T *w = reals_of<T>(a.w), *u = reals_of<T>(a.u);
  return cpu::sum_by_parts<BallSums>(ctx, a.w.size(), [=](int64_t i, int64_t count) -> BallSums {
    return {.ww = cpu::sum_of_squares(w + i, count),
            .wu = cpu::sum_of_products(w + i, u + i, count),
            .uu = cpu::sum_of_squares(u + i, count)};
  });
}

template <typename T>
void step(Context& ctx, const Hyperball& a) {
  const BallSums sums = sums_of<T>(ctx, a);
  T& radius = *reals_of<T>(a.radius);
  if (a.first) radius = static_cast<T>(std::sqrt(sums.ww));
  if (a.lr == 0 || std::isnan(cpu::read_scale(a.into.guard))) return;
  const BallStep by = ball_step(sums, static_cast<double>(radius), a.lr);
  const T *w = reals_of<T>(a.w), *u = reals_of<T>(a.u);
  const cpu::Mover<T> mover(a.into.w ? Tensor{} : a.u, a.into);
  deal_out(ctx, a.w.size(), kGrain, [=](int64_t begin, int64_t end) {
    mover.go(begin, end, [=](int64_t i) {
      // In so many words, so that the bits are the same wherever this is compiled.
      return static_cast<T>(std::fma(by.w, static_cast<double>(w[i]), by.u * static_cast<double>(u[i])));
    });
  });
}
}  // namespace

void cpu::hyperball(Context& ctx, std::span<const Hyperball> list) {
  for (const Hyperball& a : list) for_real_type(a.w.dtype, [&]<typename T>(T) { step<T>(ctx, a); });
}

int64_t hyperball_scratch_bytes(const Context& ctx, std::span<const int64_t> sizes) {
  if (ctx.where == Where::cpu) return 0;
  int64_t bytes = 0;
  for (const int64_t n : sizes)
    bytes += parts_of(n, kSumChunk) * int64_t{sizeof(BallSums)} + int64_t{sizeof(BallStep)};
  return bytes;
}
