#include <vector>

#include "model/kernels/chunks.h"
#include "optim/adam.cuh"

// Memory-bound: four elements of each tensor per thread at a time, all tensors of a call in one launch.
// Gradients, weights and directions may be read again soon; moments only at the next step. T is float, or
// double for entries in float64.

namespace {
template <typename T>
__device__ __forceinline__ T sign_of(T x) {
  return x > 0 ? T(1) : (x < 0 ? T(-1) : x);  // 0 and NaN stay
}

// ------------------------------------------------------------------------------------------- directions

template <typename T>
struct SmoothEntry {
  void* u;
  T* m;
  const void* g;
  int64_t n;
  Guards guards;
  Target<T> into;
  T beta, gain, look, aim;
  bool looks, sign, drops, wide;
};

template <typename U, typename G>
__global__ void __launch_bounds__(kChunkThreads)
    smooth_kernel(const __grid_constant__ ChunkTable<SmoothEntry<Real<G>>> table) {
  using T = Real<G>;
  const Chunk chunk = chunk_of_block(table);
  const SmoothEntry<T>& a = table.entries[chunk.index];
  if (forbids(a.guards)) return;
  const T scale = read_scale(a.guards.scale);
  const T beta = a.beta, gain = a.gain * scale, look = a.look, aim = a.aim * scale;
  if (a.u == a.g && a.m == nullptr && !a.sign && a.into.w == nullptr && gain == T(1)) return;  // u is g
  for_packs(chunk, a.wide, [&](int64_t i, auto width) {
    constexpr int N = decltype(width)::value;
    const Pack<G, N> g = load<G, N>(static_cast<const G*>(a.g) + i);
    const Pack<T, N> w = load_weights<N>(a.into, i);
    Pack<T, N> u;
    if (a.m == nullptr) {
#pragma unroll
      for (int k = 0; k < N; ++k) u.v[k] = gain * to_real(g.v[k]);
    } else {
      Pack<T, N> m = load_streaming<T, N>(a.m + i);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const T x = to_real(g.v[k]), old = m.v[k];
        m.v[k] = beta * old + gain * x;
        u.v[k] = a.looks ? look * old + aim * x : m.v[k];
      }
      store_streaming<T, N>(a.m + i, a.drops ? kept_of(m) : m);
    }
    if (a.sign) {
#pragma unroll
      for (int k = 0; k < N; ++k) u.v[k] = sign_of(u.v[k]);
    }
    if (a.u != nullptr) {
      Pack<U, N> kept;
#pragma unroll
      for (int k = 0; k < N; ++k) kept.v[k] = from_real<U>(u.v[k]);
      store<U, N>(static_cast<U*>(a.u) + i, kept);
    }
    move<N>(a.into, i, w, u);
  });
}

template <typename T>
__global__ void __launch_bounds__(kChunkThreads)
    adam_kernel(const __grid_constant__ ChunkTable<AdamEntry<T>> table) {
  const Chunk chunk = chunk_of_block(table);
  const AdamEntry<T>& a = table.entries[chunk.index];
  if (forbids(a.guards)) return;
  const T scale = read_scale(a.guards.scale);
  for_packs(chunk, a.wide, [&](int64_t i, auto width) {
    constexpr int N = decltype(width)::value;
    adam_step<N>(a, scale, i, load<T, N>(a.g + i), load_weights<N>(a.into, i));
  });
}

template <typename T>
struct ApplyEntry {
  const T* u;
  int64_t n;
  Guards guards;
  Target<T> into;
  bool wide;
};

template <typename T>
__global__ void __launch_bounds__(kChunkThreads)
    apply_kernel(const __grid_constant__ ChunkTable<ApplyEntry<T>> table) {
  const Chunk chunk = chunk_of_block(table);
  const ApplyEntry<T>& a = table.entries[chunk.index];
  if (forbids(a.guards)) return;
  for_packs(chunk, a.wide, [&](int64_t i, auto width) {
    constexpr int N = decltype(width)::value;
    const Pack<T, N> w = load_weights<N>(a.into, i);
    move<N>(a.into, i, w, load_streaming<T, N>(a.u + i));
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

template <typename T>
__global__ void __launch_bounds__(kChunkThreads)
    add_diagonal_kernel(T* x, T value, int64_t n, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kChunkThreads + threadIdx.x;  // matrix and row as one number
  if (i < count) x[i * n + i % n] += value;
}

// ----------------------------------------------------------------------------------------------- launches

/// One launch, or a few when the entries do not fit into the arguments of one.
template <typename Entry>
void launch_all(Context& ctx, void (*kernel)(ChunkTable<Entry>), const std::vector<Entry>& entries) {
  for_chunk_tables<Entry>(entries, [&](const ChunkTable<Entry>& table, unsigned blocks) {
    launch(ctx, {.grid = blocks, .block = kChunkThreads}, kernel, table);
  });
}

template <typename U, typename G>
SmoothEntry<Real<G>> entry_of(const Smooth& a) {
  using T = Real<G>;
  const Look look = look_of(a);
  return {.u = data_of<U>(a.u),
          .m = data_of<T>(a.m),
          .g = data_of<G>(a.g),
          .n = a.g.size(),
          .guards = {data_of<float>(a.scale), data_of<float>(a.into.guard)},
          .into = target_of<T>(a.into),
          .beta = static_cast<T>(a.beta),
          .gain = static_cast<T>(a.gain),
          .look = static_cast<T>(look.m),
          .aim = static_cast<T>(look.g),
          .looks = looks_ahead(a),
          .sign = a.sign,
          .drops = a.drop_denormals,
          .wide = aligned_for_four(a.u, a.m, a.g, a.into.w, a.into.copy)};
}

template <typename U, typename G>
void smooth_all(Context& ctx, std::span<const Smooth> list) {
  std::vector<SmoothEntry<Real<G>>> entries;
  for (const Smooth& a : list)
    if (a.g.size() > 0) entries.push_back(entry_of<U, G>(a));
  launch_all(ctx, smooth_kernel<U, G>, entries);
}

template <typename T>
void adam_all(Context& ctx, std::span<const AdamDirection> list) {
  std::vector<AdamEntry<T>> entries;
  for (const AdamDirection& a : list)
    if (a.g.size() > 0) entries.push_back(adam_entry<T>(a));
  launch_all(ctx, adam_kernel<T>, entries);
}

template <typename T>
void apply_all(Context& ctx, std::span<const ApplyUpdate> list) {
  std::vector<ApplyEntry<T>> entries;
  for (const ApplyUpdate& a : list)
    if (a.w.size() > 0)
      entries.push_back(
          {.u = data_of<T>(a.u),
           .n = a.w.size(),
           .guards = {nullptr, data_of<float>(a.guard)},
           .into = target_of<T>(
               {.w = a.w, .copy = a.copy, .step = a.step, .decay = a.decay, .cautious = a.cautious}),
           .wide = aligned_for_four(a.w, a.u, a.copy)});
  launch_all(ctx, apply_kernel<T>, entries);
}

/// Calls body(float{}) or body(double{}): what the operations that know no bf16 compute in.
template <typename Body>
void by_precision(DType dtype, Body&& body) {
  if (dtype == DType::f64) return body(double{});
  body(float{});
}
}  // namespace

void gpu::smooth(Context& ctx, std::span<const Smooth> list) {
  if (list.empty()) return;
  const DType g = list[0].g.dtype;
  if (g == DType::f64) return smooth_all<double, double>(ctx, list);
  // Where no u is kept, its type does not matter.
  for_float_type(list[0].u ? list[0].u.dtype : DType::f32, [&]<typename U>(U) {
    for_float_type(g, [&]<typename G>(G) { smooth_all<U, G>(ctx, list); });
  });
}

void gpu::adam_direction(Context& ctx, std::span<const AdamDirection> list) {
  if (list.empty()) return;
  by_precision(list[0].g.dtype, [&]<typename T>(T) { adam_all<T>(ctx, list); });
}

void gpu::apply_update(Context& ctx, std::span<const ApplyUpdate> list) {
  if (list.empty()) return;
  by_precision(list[0].w.dtype, [&]<typename T>(T) { apply_all<T>(ctx, list); });
}

void gpu::clip_factor(Context& ctx, const ClipFactor& args) {
  launch(ctx, {.grid = 1, .block = kChunkThreads}, clip_factor_kernel, data_of<double>(args.norm),
         data_of<float>(args.scale), data_of<double>(args.sums), args.sums.size(), args.limit);
}

void gpu::add_diagonal(Context& ctx, const AddDiagonal& args) {
  const int64_t n = args.x.shape[1], count = args.x.shape[0] * n;
  if (count == 0) return;
  by_precision(args.x.dtype, [&]<typename T>(T) {
    launch(ctx, {.grid = blocks_for(count, kChunkThreads), .block = kChunkThreads}, add_diagonal_kernel<T>,
           data_of<T>(args.x), static_cast<T>(args.value), n, count);
  });
}
