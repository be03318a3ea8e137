#include "optim/qk_clip.h"

#include <algorithm>
#include <vector>

#include "model/kernels/chunks.h"

// One pass over the q and k rows of all layers, in one launch. When no head is beyond the threshold, as in
// most steps, its blocks read nothing but the maxima.

namespace {
struct ClipEntry {
  float* x;
  bf16* copy;
  const double* largest;
  const float* guard;
  int64_t n;      // elements of the q and k rows that x has
  int64_t block;  // of which a head has so many, in each
  int NH;
  int heads_before;  // 0 when x begins with q, NH when it begins with k
  float tau, alpha;
  bool wide;
};

__global__ void __launch_bounds__(kChunkThreads)
    qk_clip_kernel(const __grid_constant__ ChunkTable<ClipEntry> table) {
  const Chunk chunk = chunk_of_block(table);
  const ClipEntry& a = table.entries[chunk.index];
  if (a.guard != nullptr && *a.guard != *a.guard) return;
  for_packs(chunk, a.wide, [&](int64_t i, auto width) {
    constexpr int N = decltype(width)::value;
    const int owner = static_cast<int>(i / a.block) + a.heads_before;  // 0 .. NH - 1: of q, then those of k
    const bool keys = owner >= a.NH;
    const auto S = static_cast<float>(a.largest[keys ? owner - a.NH : owner]);
    if (!(S > a.tau) || S == INFINITY) return;
    const float factor = powf(a.tau / S, keys ? 1.0f - a.alpha : a.alpha);
    Pack<float, N> x = load<float, N>(a.x + i);
    Pack<bf16, N> rounded;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      x.v[k] *= factor;
      rounded.v[k] = from_float<bf16>(x.v[k]);
    }
    store<float, N>(a.x + i, x);
    if (a.copy != nullptr) store<bf16, N>(a.copy + i, rounded);
  });
}
}  // namespace

void gpu::qk_clip(Context& ctx, std::span<const QkClipRows> list) {
  std::vector<ClipEntry> entries;
  for (const QkClipRows& a : list) {
    const int64_t NH = a.largest.size(), matrix = a.x.size() / a.count, block = matrix / NH;
    const int clipped = std::min(a.first + a.count, 2) - a.first;  // q and k, no v
    if (clipped <= 0) continue;
    entries.push_back({.x = data_of<float>(a.x),
                       .copy = data_of<bf16>(a.copy),
                       .largest = data_of<double>(a.largest),
                       .guard = data_of<float>(a.guard),
                       .n = clipped * matrix,
                       .block = block,
                       .NH = static_cast<int>(NH),
                       .heads_before = a.first * static_cast<int>(NH),
                       .tau = a.tau,
                       .alpha = a.alpha,
                       .wide = block % 4 == 0 && aligned_for_four(a.x, a.copy)});  // four of one head
  }
  for_chunk_tables<ClipEntry>(entries, [&](const ChunkTable<ClipEntry>& table, unsigned blocks) {
    launch(ctx, {.grid = blocks, .block = kChunkThreads}, qk_clip_kernel, table);
  });
}
