#include "model/kernels/embedding.h"

#include <cmath>

#include "model/kernels/packs.cuh"

namespace {
constexpr int kBlock = 256, kWarps = kBlock / kWarpSize;

/// A warp per token: y = wte[token] + wpe[position], P values per lane and access.
template <int P, typename Y, typename Wte, typename Wpe>
__global__ void __launch_bounds__(kBlock)
    embedding_forward_kernel(Y* y, const int32_t* tokens, const Wte* wte, const Wpe* wpe, int64_t BT,
                             int64_t T, int64_t C, int64_t V) {
  const int64_t bt = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (bt >= BT) return;
  const int64_t token = tokens[bt];
  const bool exists = token >= 0 && token < V;
  const Wte* of_token = wte + (exists ? token : 0) * C;
  const Wpe* of_position = wpe + bt % T * C;
  for (int64_t c = threadIdx.x % kWarpSize * P; c < C; c += kWarpSize * P) {
    Floats<P> sum = load_floats<P>(of_token + c);
    const Floats<P> position = load_floats<P>(of_position + c);
#pragma unroll
    for (int k = 0; k < P; ++k) sum.v[k] = exists ? sum.v[k] + position.v[k] : NAN;
    store_floats<P>(y + bt * C + c, sum);
  }
}

// dwte. Positions are sorted by token, so the gradients of one token are a run of `order`. A warp adds up
// kEmbeddingGroup sorted positions, however many runs they are. A run that lies within the group is added to
// dwte at once; one that begins or ends outside leaves its share in `shares`, (groups, 2, C): [0] for a run
// that began before this group, [1] for one that begins here and goes on. A second kernel adds those up,
// group after group. So a token that is everywhere (a line break) costs no more than others.

/// The run that a sorted position belongs to: its token, or -1 past the end and for tokens outside [0, V).
__device__ __forceinline__ int32_t run_of(const int32_t* tokens, const int32_t* order, int64_t i, int64_t BT,
                                          int64_t V) {
  if (i < 0 || i >= BT) return -1;
  const int32_t token = tokens[order[i]];
  return token >= 0 && token < V ? token : -1;
}

template <int P>
__device__ __forceinline__ void add_to(float* to, const Floats<P>& sum) {
  Floats<P> total = load_floats<P>(to);
#pragma unroll
  for (int k = 0; k < P; ++k) total.v[k] += sum.v[k];
  store_floats<P>(to, total);
}

/// Block (i, j): columns from 32 P i, groups from kWarps j; a warp per group.
template <int P, typename Y>
__global__ void __launch_bounds__(kBlock)
    embedding_dwte_runs_kernel(float* dwte, float* shares, const Y* dy, const int32_t* tokens,
                               const int32_t* order, int64_t BT, int64_t C, int64_t V) {
  static_assert(kEmbeddingGroup == kWarpSize);
  constexpr int kBatch = 4;  // rows in flight
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t c = (int64_t{blockIdx.x} * kWarpSize + lane) * P;
  const int64_t group = int64_t{blockIdx.y} * kWarps + threadIdx.x / kWarpSize, first = group * kWarpSize;
  if (first >= BT) return;  // the whole warp
  const int32_t my_position = first + lane < BT ? order[first + lane] : 0;
  const int32_t my_run = run_of(tokens, order, first + lane, BT, V);
  const int32_t before = run_of(tokens, order, first - 1, BT, V);
  const int32_t after = run_of(tokens, order, first + kWarpSize, BT, V);

  Floats<P> sum{};
  bool began_before = before == __shfl_sync(kFullMask, my_run, 0);
  for (int i0 = 0; i0 < kWarpSize; i0 += kBatch) {
    Floats<P> rows[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t position = __shfl_sync(kFullMask, my_position, i0 + i);
      rows[i] = {};
      if (c < C) rows[i] = load_floats<P>(dy + position * C + c);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int32_t run = __shfl_sync(kFullMask, my_run, i0 + i);
      const int32_t shuffled = __shfl_sync(kFullMask, my_run, (i0 + i + 1) % kWarpSize);
      const int32_t next = i0 + i + 1 < kWarpSize ? shuffled : after;
#pragma unroll
      for (int k = 0; k < P; ++k) sum.v[k] += rows[i].v[k];
      const bool goes_on_after = run == next && i0 + i + 1 == kWarpSize;
      if (run == next && !goes_on_after) continue;
      if (run >= 0 && c < C) {
        if (began_before || goes_on_after)
          store_floats<P>(shares + (group * 2 + (began_before ? 0 : 1)) * C + c, sum);
        else
          add_to<P>(dwte + run * C + c, sum);
      }
      sum = {};
      began_before = false;
    }
  }
}

/// The runs that more than one group shares: the warp of the group where the run begins adds up its shares.
template <int P>
__global__ void __launch_bounds__(kBlock)
    embedding_dwte_shares_kernel(float* dwte, const float* shares, const int32_t* tokens,
                                 const int32_t* order, int64_t BT, int64_t C, int64_t V) {
  const int64_t c = (int64_t{blockIdx.x} * kWarpSize + threadIdx.x % kWarpSize) * P;
  const int64_t group = int64_t{blockIdx.y} * kWarps + threadIdx.x / kWarpSize;
  const auto run_at = [&](int64_t i) { return run_of(tokens, order, i, BT, V); };
  const int64_t end = (group + 1) * kWarpSize;  // of the group
  const int32_t run = run_at(end - 1);
  if (c >= C || run < 0 || run_at(end) != run) return;  // nothing goes on after this group
  if (run_at(end - kWarpSize) == run && run_at(end - kWarpSize - 1) == run) return;  // nor begins here
  Floats<P> sum = load_floats<P>(shares + (group * 2 + 1) * C + c);
  // A run's groups are consecutive, so the last of them is found by bisection: the first group from `low` on
  // that begins with another run.
  int64_t low = group + 2, high = (BT + kWarpSize - 1) / kWarpSize;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (run_at(middle * kWarpSize) == run)
      low = middle + 1;
    else
      high = middle;
  }
#pragma unroll 8
  for (int64_t g = group + 1; g < low; ++g) {
    const Floats<P> share = load_floats<P>(shares + g * 2 * C + c);
#pragma unroll
    for (int k = 0; k < P; ++k) sum.v[k] += share.v[k];
  }
  add_to<P>(dwte + run * C + c, sum);
}

/// dwpe: a thread per pack of a position. Positions past T become zero unless accumulating.
template <int P, typename Y>
__global__ void __launch_bounds__(kBlock)
    embedding_dwpe_kernel(float* dwpe, const Y* dy, int64_t B, int64_t T, int64_t C, int64_t positions,
                          bool accumulate) {
  const int64_t i = (int64_t{blockIdx.x} * kBlock + threadIdx.x) * P;
  if (i >= positions * C) return;
  Floats<P> sum{};
  if (accumulate) sum = load_floats<P>(dwpe + i);
  if (i < T * C) {
#pragma unroll 4
    for (int64_t b = 0; b < B; ++b) {
      const Floats<P> row = load_floats<P>(dy + b * T * C + i);
#pragma unroll
      for (int k = 0; k < P; ++k) sum.v[k] += row.v[k];
    }
  }
  store_floats<P>(dwpe + i, sum);
}
}  // namespace

void gpu::embedding_forward(Context& ctx, const EmbeddingForward& args) {
  const int64_t BT = args.tokens.size(), C = args.wte.cols();
  for_float_type(args.y.dtype, [&]<typename Y>(Y) {
    for_float_type(args.wte.dtype, [&]<typename Wte>(Wte) {
      for_float_type(args.wpe.dtype, [&]<typename Wpe>(Wpe) {
        Y* y = data_of<Y>(args.y);
        const Wte* wte = data_of<Wte>(args.wte);
        const Wpe* wpe = data_of<Wpe>(args.wpe);
        by_width<Y>(can_vectorize<Y>(C, y, wte, wpe), [&](auto P) {
          launch(ctx, {.grid = blocks_for(BT, kWarps), .block = kBlock},
                 embedding_forward_kernel<P(), Y, Wte, Wpe>, y, args.tokens.i32(), wte, wpe, BT,
                 args.tokens.shape[1], C, args.wte.rows());
        });
      });
    });
  });
}

void gpu::embedding_backward(Context& ctx, const EmbeddingBackward& args) {
  const int64_t B = args.tokens.shape[0], T = args.tokens.shape[1], BT = B * T;
  const int64_t C = args.dwte.cols(), V = args.dwte.rows(), positions = args.dwpe.rows();
  expect_shape(args.order, {BT}, "embedding_backward: order");
  const int32_t *tokens = args.tokens.i32(), *order = args.order.i32();
  float *dwte = args.dwte.f32(), *dwpe = args.dwpe.f32();
  if (!args.accumulate_wte)
    CUDA_CHECK(cudaMemsetAsync(dwte, 0, static_cast<size_t>(args.dwte.bytes()), ctx.device->stream));
  Scratch::Frame frame(ctx.scratch);
  const int64_t groups = blocks_for(BT, kEmbeddingGroup);
  float* shares = frame.floats(groups * 2 * C);
  for_float_type(args.dy.dtype, [&]<typename Y>(Y) {
    const Y* dy = data_of<Y>(args.dy);
    by_width<Y>(can_vectorize<Y>(C, dy, dwte, dwpe, shares), [&](auto P) {
      const dim3 grid = {blocks_for(C, kWarpSize * P), blocks_for(groups, kWarps)};
      launch(ctx, {.grid = grid, .block = kBlock}, embedding_dwte_runs_kernel<P(), Y>, dwte, shares, dy,
             tokens, order, BT, C, V);
      launch(ctx, {.grid = grid, .block = kBlock}, embedding_dwte_shares_kernel<P()>, dwte, shares, tokens,
             order, BT, C, V);
      launch(ctx, {.grid = blocks_for(positions * C / P, kBlock), .block = kBlock},
             embedding_dwpe_kernel<P(), Y>, dwpe, dy, B, T, C, positions, args.accumulate_wpe);
    });
  });
}
