#include "optim/hyperball.h"

#include <vector>

#include "model/kernels/chunks.h"
#include "model/kernels/reduce_plan.h"
#include "optim/move.cuh"

// Memory-bound. Blocks add up chunks of W and u, one block per weight adds these sums in order and makes the
// factors of u' of them, then blocks make u' of the same chunks. All weights of a table in one launch each.

namespace {
static_assert(kChunk == kSumChunk);  // what hyperball_scratch_bytes() counts

template <typename T>
struct BallEntry {
  const T *w, *u;
  T *kept, *radius;  // where u' goes, or null
  int64_t n;
  const float* guard;
  Target<T> into;
  double lr;
  bool first, wide;
};

template <typename T>
__global__ void __launch_bounds__(kChunkThreads)
    ball_sums_kernel(BallSums* parts, const __grid_constant__ ChunkTable<BallEntry<T>> table) {
  __shared__ double shared[kChunkThreads / kWarpSize];
  const Chunk chunk = chunk_of_block(table);
  const BallEntry<T>& a = table.entries[chunk.index];
  double ww = 0, wu = 0, uu = 0;
  for_packs(chunk, a.wide, [&](int64_t i, auto width) {
    constexpr int N = decltype(width)::value;
    const Pack<T, N> w = load<T, N>(a.w + i), u = load<T, N>(a.u + i);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const double x = w.v[k], y = u.v[k];
      ww += x * x, wu += x * y, uu += y * y;
    }
  });
  ww = block_sum(ww, shared);
  wu = block_sum(wu, shared);
  uu = block_sum(uu, shared);
  if (threadIdx.x == 0) parts[blockIdx.x].ww = ww, parts[blockIdx.x].wu = wu, parts[blockIdx.x].uu = uu;
}

/// One block for each weight of the table.
template <typename T>
__global__ void __launch_bounds__(kChunkThreads)
    ball_step_kernel(BallStep* steps, const BallSums* parts,
                     const __grid_constant__ ChunkTable<BallEntry<T>> table) {
  __shared__ double shared[kChunkThreads / kWarpSize];
  const int index = static_cast<int>(blockIdx.x);
  const BallEntry<T>& a = table.entries[index];
  BallSums sums;
  for (unsigned part = (index > 0 ? table.end[index - 1] : 0) + threadIdx.x; part < table.end[index];
       part += kChunkThreads)
    sums += parts[part];
  sums.ww = block_sum(sums.ww, shared);
  sums.wu = block_sum(sums.wu, shared);
  sums.uu = block_sum(sums.uu, shared);
  if (threadIdx.x != 0) return;
  if (a.first) *a.radius = static_cast<T>(sqrt(sums.ww));
  steps[index] = ball_step(sums, static_cast<double>(*a.radius), a.lr);
}

template <typename T>
__global__ void __launch_bounds__(kChunkThreads)
    ball_move_kernel(const BallStep* steps, const __grid_constant__ ChunkTable<BallEntry<T>> table) {
  const Chunk chunk = chunk_of_block(table);
  const BallEntry<T>& a = table.entries[chunk.index];
  if (a.lr == 0 || is_nan(read_scale(a.guard))) return;
  const BallStep by = steps[chunk.index];
  for_packs(chunk, a.wide, [&](int64_t i, auto width) {
    constexpr int N = decltype(width)::value;
    const Pack<T, N> w = load<T, N>(a.w + i);
    Pack<T, N> u = load<T, N>(a.u + i);
#pragma unroll
    for (int k = 0; k < N; ++k)
      u.v[k] = static_cast<T>(fma(by.w, static_cast<double>(w.v[k]), by.u * static_cast<double>(u.v[k])));
    if (a.kept != nullptr) store<T, N>(a.kept + i, u);
    move<N>(a.into, i, w, u);
  });
}

template <typename T>
void step_all(Context& ctx, std::span<const Hyperball> list) {
  std::vector<BallEntry<T>> entries;
  std::vector<int64_t> sizes;
  for (const Hyperball& a : list) {
    entries.push_back({.w = data_of<T>(a.w),
                       .u = data_of<T>(a.u),
                       .kept = a.into.w ? nullptr : data_of<T>(a.u),
                       .radius = data_of<T>(a.radius),
                       .n = a.w.size(),
                       .guard = data_of<float>(a.into.guard),
                       .into = target_of<T>(a.into),
                       .lr = a.lr,
                       .first = a.first,
                       .wide = aligned_for_four(a.w, a.u, a.into.copy)});
    sizes.push_back(a.w.size());
  }
  Scratch::Frame frame(ctx.scratch);
  double* room = frame.doubles(hyperball_scratch_bytes(ctx, sizes) / 8);
  for_chunk_tables<BallEntry<T>>(entries, [&](const ChunkTable<BallEntry<T>>& table, unsigned blocks) {
    if (blocks == 0) return;
    auto* parts = reinterpret_cast<BallSums*>(room);
    auto* steps = reinterpret_cast<BallStep*>(parts + blocks);
    room = reinterpret_cast<double*>(steps + table.count);
    launch(ctx, {.grid = blocks, .block = kChunkThreads}, ball_sums_kernel<T>, parts, table);
    launch(ctx, {.grid = static_cast<unsigned>(table.count), .block = kChunkThreads}, ball_step_kernel<T>,
           steps, static_cast<const BallSums*>(parts), table);
    launch(ctx, {.grid = blocks, .block = kChunkThreads}, ball_move_kernel<T>,
           static_cast<const BallStep*>(steps), table);
  });
}
}  // namespace

void gpu::hyperball(Context& ctx, std::span<const Hyperball> list) {
  if (list.empty()) return;
  list[0].w.dtype == DType::f64 ? step_all<double>(ctx, list) : step_all<float>(ctx, list);
}
