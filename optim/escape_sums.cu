#include "optim/escape_sums.h"

#include <vector>

#include "model/kernels/reduce_plan.h"
#include "optim/adam.cuh"

// Memory-bound. As in reduce.cu: blocks add up parts whose bounds depend on the size alone, then the host
// adds the parts in order. All in float64.

namespace {
constexpr int64_t kMostParts = kWholeParts / 2;  // two sums each, in the scratch of a function with one

template <typename T>
struct EscapeTask {
  const T *g, *w, *start;
  T* s;
  T beta, gain;
  int64_t n, part;
  bool sizes, wide, steps;
  AdamEntry<T> then;  // where it steps
};

/// parts[block] = the sums of the block's part.
template <typename T>
__global__ void __launch_bounds__(kChunkThreads)
    escape_sums_kernel(Measured* parts, const __grid_constant__ EscapeTask<T> a) {
  __shared__ double shared[kChunkThreads / kWarpSize];
  const int64_t begin = int64_t{blockIdx.x} * a.part;
  double along = 0, dual = 0;
  const bool steps = a.steps && !forbids(a.then.guards);
  const T scale = steps ? static_cast<T>(read_scale(a.then.guards.scale)) : T(1);
  for_packs({0, begin, begin + a.part < a.n ? begin + a.part : a.n}, a.wide, [&](int64_t i, auto width) {
    constexpr int N = decltype(width)::value;
    const Pack<T, N> g = load<T, N>(a.g + i), w = load<T, N>(a.w + i);
    const Pack<T, N> start = load_streaming<T, N>(a.start + i);
#pragma unroll
    for (int k = 0; k < N; ++k) along += g.v[k] * (static_cast<double>(start.v[k]) - w.v[k]);
    if (a.s != nullptr) {
      Pack<T, N> s = load_streaming<T, N>(a.s + i);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        s.v[k] = a.beta * s.v[k] + a.gain * g.v[k];
        dual += fabs(static_cast<double>(s.v[k]));
      }
      store_streaming<T, N>(a.s + i, s);
    } else if (a.sizes) {
#pragma unroll
      for (int k = 0; k < N; ++k) dual += fabs(static_cast<double>(g.v[k]));
    }
    if (steps) adam_step<N>(a.then, scale, i, g, w);
  });
  along = block_sum(along, shared);
  dual = block_sum(dual, shared);
  if (threadIdx.x == 0) parts[blockIdx.x].along = along, parts[blockIdx.x].dual = dual;
}

template <typename T>
Measured sums_of(Context& ctx, const EscapeSums& args) {
  const int64_t n = args.g.size(), step = 4 * kChunkThreads;
  const int64_t part = parts_of(parts_of(n, kMostParts), step) * step, count = parts_of(n, part);
  const AdamEntry<T> then = args.then != nullptr ? adam_entry<T>(*args.then) : AdamEntry<T>{};
  const EscapeTask<T> task{
      .g = data_of<T>(args.g),
      .w = data_of<T>(args.w),
      .start = data_of<T>(args.start),
      .s = data_of<T>(args.s),
      .beta = static_cast<T>(args.beta),
      .gain = static_cast<T>(args.gain),
      .n = n,
      .part = part,
      .sizes = args.sizes,
      .wide = aligned_for_four(args.g, args.w, args.start, args.s) && (args.then == nullptr || then.wide),
      .steps = args.then != nullptr,
      .then = then};
  Scratch::Frame frame(ctx.scratch);
  auto* parts = reinterpret_cast<Measured*>(frame.doubles(2 * count));
  launch(ctx, {.grid = static_cast<unsigned>(count), .block = kChunkThreads}, escape_sums_kernel<T>, parts,
         task);
  std::vector<Measured> here(static_cast<size_t>(count));
  gpu::copy_out(*ctx.device, here.data(), parts, count * int64_t{sizeof(Measured)});
  Measured sums;
  for (const Measured& each : here) sums += each;
  return sums;
}
}  // namespace

Measured gpu::escape_sums(Context& ctx, const EscapeSums& args) {
  if (args.g.size() == 0) return {};
  return args.g.dtype == DType::f64 ? sums_of<double>(ctx, args) : sums_of<float>(ctx, args);
}
