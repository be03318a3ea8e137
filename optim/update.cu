#include <vector>

#include "model/kernels/chunks.h"
#include "optim/update.h"

// Memory-bound: four elements of each tensor per thread at a time, all tensors of a call in one launch.
// Gradients, weights and directions may be read again soon; moments only at the next step.

namespace {
/// The number behind a `scale` or `guard`; 1 when there is none. NaN means: write nothing.
__device__ __forceinline__ float read_scale(const float* scale) {
  return scale == nullptr ? 1.0f : *scale;
}
__device__ __forceinline__ bool is_nan(float x) {
  return x != x;
}

struct SmoothEntry {
  void* u;
  float* m;
  const void* g;
  const float* scale;
  int64_t n;
  float beta, gain;
  bool nesterov, wide;
};

template <typename U, typename G>
__global__ void __launch_bounds__(kChunkThreads)
    smooth_kernel(const __grid_constant__ ChunkTable<SmoothEntry> table) {
  const Chunk chunk = chunk_of_block(table);
  const SmoothEntry& a = table.entries[chunk.index];
  const float scale = read_scale(a.scale);
  if (is_nan(scale)) return;
  const float beta = a.beta, gain = a.gain * scale;
  U* u = static_cast<U*>(a.u);
  const G* g = static_cast<const G*>(a.g);
  for_packs(chunk, a.wide, [&](int64_t i, auto width) {
    constexpr int N = decltype(width)::value;
    const Pack<G, N> fresh = load<G, N>(g + i);
    Pack<U, N> out;
    if (a.m == nullptr) {
#pragma unroll
      for (int k = 0; k < N; ++k) out.v[k] = from_float<U>(gain * to_float(fresh.v[k]));
    } else {
      Pack<float, N> mean = load_streaming<float, N>(a.m + i);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float x = gain * to_float(fresh.v[k]);
        mean.v[k] = beta * mean.v[k] + x;
        out.v[k] = from_float<U>(a.nesterov ? beta * mean.v[k] + x : mean.v[k]);
      }
      store_streaming<float, N>(a.m + i, mean);
    }
    store<U, N>(u + i, out);
  });
}

struct AdamEntry {
  float *u, *m, *v;
  const float *g, *scale;
  int64_t n;
  float beta1, beta2, eps, inverse1, inverse2;
  bool wide;
};

__global__ void __launch_bounds__(kChunkThreads)
    adam_kernel(const __grid_constant__ ChunkTable<AdamEntry> table) {
  const Chunk chunk = chunk_of_block(table);
  const AdamEntry& a = table.entries[chunk.index];
  const float scale = read_scale(a.scale);
  if (is_nan(scale)) return;
  for_packs(chunk, a.wide, [&](int64_t i, auto width) {
    constexpr int N = decltype(width)::value;
    Pack<float, N> u = load<float, N>(a.g + i), m{}, v{};
    if (a.m != nullptr) m = load_streaming<float, N>(a.m + i);
    if (a.v != nullptr) v = load_streaming<float, N>(a.v + i);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float x = scale * u.v[k];
      m.v[k] = a.m != nullptr ? a.beta1 * m.v[k] + (1.0f - a.beta1) * x : x;
      float root = fabsf(x);  // not sqrt(x * x), which underflows
      if (a.v != nullptr) {
        v.v[k] = a.beta2 * v.v[k] + (1.0f - a.beta2) * x * x;
        root = sqrtf(v.v[k] * a.inverse2);
      }
      const float denominator = root + a.eps;
      u.v[k] = denominator == 0.0f ? 0.0f : m.v[k] * a.inverse1 / denominator;
    }
    if (a.m != nullptr) store_streaming<float, N>(a.m + i, m);
    if (a.v != nullptr) store_streaming<float, N>(a.v + i, v);
    store<float, N>(a.u + i, u);
  });
}

struct SignEntry {
  float* u;
  const float* x;
  int64_t n;
  bool wide;
};

__global__ void __launch_bounds__(kChunkThreads)
    sign_kernel(const __grid_constant__ ChunkTable<SignEntry> table) {
  const Chunk chunk = chunk_of_block(table);
  const SignEntry& a = table.entries[chunk.index];
  for_packs(chunk, a.wide, [&](int64_t i, auto width) {
    constexpr int N = decltype(width)::value;
    Pack<float, N> u = load<float, N>(a.x + i);
#pragma unroll
    for (int k = 0; k < N; ++k) u.v[k] = u.v[k] > 0 ? 1.0f : (u.v[k] < 0 ? -1.0f : u.v[k]);  // 0 and NaN stay
    store<float, N>(a.u + i, u);
  });
}

struct ApplyEntry {
  float* w;
  const float* u;
  bf16* copy;
  const float* guard;
  int64_t n;
  float step, decay;
  bool cautious, wide;
};

__global__ void __launch_bounds__(kChunkThreads)
    apply_kernel(const __grid_constant__ ChunkTable<ApplyEntry> table) {
  const Chunk chunk = chunk_of_block(table);
  const ApplyEntry& a = table.entries[chunk.index];
  if (is_nan(read_scale(a.guard))) return;
  for_packs(chunk, a.wide, [&](int64_t i, auto width) {
    constexpr int N = decltype(width)::value;
    Pack<float, N> w = load_streaming<float, N>(a.w + i);
    const Pack<float, N> u = load_streaming<float, N>(a.u + i);
    Pack<bf16, N> rounded;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const bool decays = !a.cautious || u.v[k] * w.v[k] > 0;
      w.v[k] = w.v[k] - (decays ? a.decay * w.v[k] : 0.0f) - a.step * u.v[k];
      rounded.v[k] = from_float<bf16>(w.v[k]);
    }
    store<float, N>(a.w + i, w);
    if (a.copy != nullptr) store<bf16, N>(a.copy + i, rounded);
  });
}

__global__ void __launch_bounds__(kChunkThreads)
    clip_factor_kernel(double* norm, float* scale, const double* sums, int64_t n, double limit) {
  __shared__ double shared[kChunkThreads / kWarpSize];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kChunkThreads) sum += sums[i];
  sum = block_sum(sum, shared);
  if (threadIdx.x != 0) return;
  const double root = sqrt(sum);
  *norm = root;
  const double factor = limit > 0 && root > limit ? limit / root : 1;
  *scale = static_cast<float>(root - root == 0 ? factor : root - root);  // infinity - infinity is NaN
}

__global__ void __launch_bounds__(kChunkThreads)
    add_diagonal_kernel(float* x, float value, int64_t n, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kChunkThreads + threadIdx.x;  // matrix and row as one number
  if (i < count) x[i * n + i % n] += value;
}

/// One launch, or a few when the entries do not fit into the arguments of one.
template <typename Entry>
void launch_all(Context& ctx, void (*kernel)(ChunkTable<Entry>), const std::vector<Entry>& entries) {
  for_chunk_tables<Entry>(entries, [&](const ChunkTable<Entry>& table, unsigned blocks) {
    launch(ctx, {.grid = blocks, .block = kChunkThreads}, kernel, table);
  });
}
}  // namespace

void gpu::smooth(Context& ctx, std::span<const Smooth> list) {
  std::vector<SmoothEntry> entries;
  for (const Smooth& a : list)
    if (a.g.size() > 0)
      entries.push_back({.u = a.u.data,
                         .m = data_of<float>(a.m),
                         .g = a.g.data,
                         .scale = data_of<float>(a.scale),
                         .n = a.g.size(),
                         .beta = a.beta,
                         .gain = a.gain,
                         .nesterov = a.nesterov,
                         .wide = aligned_for_four(a.u, a.m, a.g)});
  if (entries.empty()) return;
  for_float_type(list[0].u.dtype, [&]<typename U>(U) {
    for_float_type(list[0].g.dtype,
                   [&]<typename G>(G) { launch_all<SmoothEntry>(ctx, smooth_kernel<U, G>, entries); });
  });
}

void gpu::adam_direction(Context& ctx, std::span<const AdamDirection> list) {
  std::vector<AdamEntry> entries;
  for (const AdamDirection& a : list)
    if (a.g.size() > 0)
      entries.push_back({.u = data_of<float>(a.u),
                         .m = data_of<float>(a.m),
                         .v = data_of<float>(a.v),
                         .g = data_of<float>(a.g),
                         .scale = data_of<float>(a.scale),
                         .n = a.g.size(),
                         .beta1 = a.beta1,
                         .beta2 = a.beta2,
                         .eps = a.eps,
                         .inverse1 = 1.0f / a.correction1,
                         .inverse2 = 1.0f / a.correction2,
                         .wide = aligned_for_four(a.u, a.m, a.v, a.g)});
  launch_all<AdamEntry>(ctx, adam_kernel, entries);
}

void gpu::sign(Context& ctx, std::span<const Sign> list) {
  std::vector<SignEntry> entries;
  for (const Sign& a : list)
    if (a.x.size() > 0)
      entries.push_back({.u = data_of<float>(a.u),
                         .x = data_of<float>(a.x),
                         .n = a.x.size(),
                         .wide = aligned_for_four(a.u, a.x)});
  launch_all<SignEntry>(ctx, sign_kernel, entries);
}

void gpu::apply_update(Context& ctx, std::span<const ApplyUpdate> list) {
  std::vector<ApplyEntry> entries;
  for (const ApplyUpdate& a : list)
    if (a.w.size() > 0)
      entries.push_back({.w = data_of<float>(a.w),
                         .u = data_of<float>(a.u),
                         .copy = data_of<bf16>(a.copy),
                         .guard = data_of<float>(a.guard),
                         .n = a.w.size(),
                         .step = a.step,
                         .decay = a.decay,
                         .cautious = a.cautious,
                         .wide = aligned_for_four(a.w, a.u, a.copy)});
  launch_all<ApplyEntry>(ctx, apply_kernel, entries);
}

void gpu::clip_factor(Context& ctx, const ClipFactor& args) {
  launch(ctx, {.grid = 1, .block = kChunkThreads}, clip_factor_kernel, data_of<double>(args.norm),
         data_of<float>(args.scale), data_of<double>(args.sums), args.sums.size(), args.limit);
}

void gpu::add_diagonal(Context& ctx, const AddDiagonal& args) {
  const int64_t n = args.x.shape[1], count = args.x.shape[0] * n;
  if (count == 0) return;
  launch(ctx, {.grid = blocks_for(count, kChunkThreads), .block = kChunkThreads}, add_diagonal_kernel,
         data_of<float>(args.x), args.value, n, count);
}
