#include "model/kernels/layernorm.h"

#include "model/kernels/bias.h"
#include "model/kernels/packs.cuh"

// A row is read once and stays in registers: W warps own it, and every lane holds K of its values, in packs
// of 16 bytes. So C may be up to 32 K W. Rows that are longer, or not made of whole packs, take the slower
// kernels at the end, which read them more than once, value by value.

namespace {
constexpr int kBlock = 256, kWarps = kBlock / kWarpSize;

/// Sums of two numbers over the W warps that share a row, in a fixed order. `shared` must not be in use by an
/// earlier call. All threads of the block call it.
template <int W>
__device__ __forceinline__ float2 row_sums(float a, float b, float2* shared) {
  float2 sum = make_float2(warp_sum(a), warp_sum(b));
  if constexpr (W == 1) return sum;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  if (threadIdx.x % kWarpSize == 0) shared[warp] = sum;
  __syncthreads();
  const float2* of_row = shared + warp / W * W;
  sum = of_row[0];
#pragma unroll
  for (int w = 1; w < W; ++w) sum.x += of_row[w].x, sum.y += of_row[w].y;
  return sum;
}

/// Where a lane's packs of P values lie in its row: pack i begins at column first + i * step.
template <int P, int W>
struct Lanes {
  static constexpr int kStep = W * kWarpSize * P;
  int first = static_cast<int>(threadIdx.x) % (W * kWarpSize) * P;
};

template <typename T>
struct Forward {
  T *y, *x;
  float *mean, *rstd;
  const float *gain, *bias;
  const T *residual, *delta;  // null when not fused
  int64_t rows, C;
  float eps;
};

template <typename T, int K, int W>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 2 ? 4 : 3)
    layernorm_forward_kernel(const Forward<T> p) {
  constexpr int P = kPackSize<T>, kPacks = K / P;
  __shared__ float2 shared[2][kWarps];
  const Lanes<P, W> lanes;
  const int C = static_cast<int>(p.C);
  const int64_t r = int64_t{blockIdx.x} * (kWarps / W) + threadIdx.x / (W * kWarpSize);
  const bool exists = r < p.rows;  // warps without a row go on: they meet the others in row_sums
  const int64_t at = r * p.C;

  // All loads first, as they come: what is computed in between would wait for one after the other.
  const bool fused = p.delta != nullptr;
  const T* const from = fused ? p.residual : p.x;
  Pack<T, P> streams[kPacks] = {}, deltas[kPacks] = {};
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = lanes.first + i * lanes.kStep;
    const bool mine = exists && c < C;
    if (mine) streams[i] = load_streaming<T, P>(from + at + c);
    if (mine && fused) deltas[i] = load_streaming<T, P>(p.delta + at + c);
  }
  Floats<P> x[kPacks];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = lanes.first + i * lanes.kStep;
    if (fused) {
      const Floats<P> residual = to_floats(streams[i]), delta = to_floats(deltas[i]);
#pragma unroll
      for (int k = 0; k < P; ++k) streams[i].v[k] = from_float<T>(residual.v[k] + delta.v[k]);
      if (exists && c < C) store_streaming<T, P>(p.x + at + c, streams[i]);
    }
    x[i] = to_floats(streams[i]);
#pragma unroll
    for (int k = 0; k < P; ++k) sum += x[i].v[k];
  }
  const float mean = row_sums<W>(sum, 0, shared[0]).x / static_cast<float>(C);
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kPacks; ++i)
#pragma unroll
    for (int k = 0; k < P; ++k) {
      const float deviation = lanes.first + i * lanes.kStep < C ? x[i].v[k] - mean : 0.0f;
      squares += deviation * deviation;
    }
  const float rstd = rsqrtf(row_sums<W>(squares, 0, shared[1]).x / static_cast<float>(C) + p.eps);
  if (!exists) return;
  if (lanes.first == 0) p.mean[r] = mean, p.rstd[r] = rstd;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = lanes.first + i * lanes.kStep;
    if (c >= C) continue;
    const Floats<P> gain = load_floats<P>(p.gain + c), bias = load_floats<P>(p.bias + c);
#pragma unroll
    for (int k = 0; k < P; ++k) x[i].v[k] = (x[i].v[k] - mean) * rstd * gain.v[k] + bias.v[k];
    store_floats<P>(p.y + at + c, x[i]);  // the next product reads it
  }
}

template <typename T>
struct Backward {
  T* dx;
  const T *dy, *x;
  const float *mean, *rstd, *gain;
  const T* dresidual;       // null: zero
  float *dgains, *dbiases;  // (blocks, C): the blocks' shares
  int64_t rows, C;
};

/// Adds up, in order, what the groups of W warps of a block hold of dgain or dbias, into out (C).
template <int K, int P, int W>
__device__ __forceinline__ void add_groups(float* out, const float (&share)[K], int C, float* sums) {
  constexpr int kGroups = kWarps / W, kWide = 4;  // one by one, lanes would collide in banks, eight at a time
  const Lanes<P, W> lanes;
  const int group = static_cast<int>(threadIdx.x) / (W * kWarpSize);
  for (int g = 0; g < kGroups; ++g) {
    if (g == group) {
#pragma unroll
      for (int i = 0; i < K; i += kWide) {
        const int c = lanes.first + i / P * lanes.kStep + i % P;
        if (c >= C) continue;
        Floats<kWide> sum{};
        if (g > 0) sum = load_floats<kWide>(sums + c);
#pragma unroll
        for (int k = 0; k < kWide; ++k) sum.v[k] += share[i + k];
        store_floats<kWide>(sums + c, sum);
      }
    }
    __syncthreads();
  }
  for (int c = static_cast<int>(threadIdx.x); c < C; c += kBlock) out[c] = sums[c];
  __syncthreads();  // sums may be used again
}

// In bf16, at most 128 registers a thread keep two blocks on a multiprocessor, so that kLayernormBlocks fill
// 128 multiprocessors. float32 takes more: the values of a row are twice as wide.
template <typename T, int K, int W>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 2 ? 2 : 1)
    layernorm_backward_kernel(const Backward<T> p) {
  constexpr int P = kPackSize<T>, kPacks = K / P, kGroups = kWarps / W;
  DYN_SHARED(float, sums);  // C
  __shared__ float2 shared[2][kWarps];
  const Lanes<P, W> lanes;
  const int C = static_cast<int>(p.C);
  const int group = static_cast<int>(threadIdx.x) / (W * kWarpSize);
  const float per_C = 1.0f / static_cast<float>(C);
  float dgain[K] = {}, dbias[K] = {};
  int parity = 0;
  // Every group of the block makes the same number of rounds: they meet in row_sums.
  for (int64_t r0 = int64_t{blockIdx.x} * kGroups; r0 < p.rows; r0 += int64_t{gridDim.x} * kGroups) {
    const int64_t r = r0 + group, at = r * p.C;
    const bool exists = r < p.rows;
    const float mean = exists ? p.mean[r] : 0.0f, rstd = exists ? p.rstd[r] : 0.0f;
    Pack<T, P> dys[kPacks], xs[kPacks];  // stored as they came, to save registers
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = lanes.first + i * lanes.kStep;
      if (!exists || c >= C) continue;
      dys[i] = load_streaming<T, P>(p.dy + at + c);
      xs[i] = load_streaming<T, P>(p.x + at + c);
    }
    // Packs are converted once for the sums and once for dx: kept as floats, they would spill.
    float sum_g = 0, sum_gx = 0;  // over channels, of g = gain dy and of g xhat
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = lanes.first + i * lanes.kStep;
      if (!exists || c >= C) continue;
      const Floats<P> gain = load_floats<P>(p.gain + c), dy = to_floats(dys[i]), x = to_floats(xs[i]);
#pragma unroll
      for (int k = 0; k < P; ++k) {
        const float xhat = (x.v[k] - mean) * rstd;
        sum_g += gain.v[k] * dy.v[k];
        sum_gx += gain.v[k] * dy.v[k] * xhat;
        dgain[i * P + k] += dy.v[k] * xhat;
        dbias[i * P + k] += dy.v[k];
      }
    }
    Pack<T, P> past[kPacks] = {};  // all on their way while the warps add up
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = lanes.first + i * lanes.kStep;
      if (p.dresidual != nullptr && exists && c < C) past[i] = load_streaming<T, P>(p.dresidual + at + c);
    }
    const float2 totals = row_sums<W>(sum_g, sum_gx, shared[parity]);
    parity ^= 1;  // a fast warp may be a round ahead of a slow one, but not two
    const float mean_g = totals.x * per_C, mean_gx = totals.y * per_C;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = lanes.first + i * lanes.kStep;
      if (!exists || c >= C) continue;
      const Floats<P> gain = load_floats<P>(p.gain + c), dy = to_floats(dys[i]), x = to_floats(xs[i]);
      Floats<P> dx = to_floats(past[i]);
#pragma unroll
      for (int k = 0; k < P; ++k) {
        const float xhat = (x.v[k] - mean) * rstd;
        dx.v[k] += rstd * (gain.v[k] * dy.v[k] - mean_g - xhat * mean_gx);
      }
      store_floats<P>(p.dx + at + c, dx);
    }
  }
  add_groups<K, P, W>(p.dgains + blockIdx.x * p.C, dgain, C, sums);
  add_groups<K, P, W>(p.dbiases + blockIdx.x * p.C, dbias, C, sums);
}

/// Calls body(K, W) with the smallest layout that holds C channels.
template <typename Body>
void by_layout(int64_t C, Body&& body) {
  const auto fits = [&](auto K, auto W) {
    if (C > kWarpSize * K * W) return false;
    body(K, W);
    return true;
  };
  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, 2> two;
  const std::integral_constant<int, 4> four;
  const std::integral_constant<int, 8> eight;
  const std::integral_constant<int, 16> sixteen;
  const std::integral_constant<int, 24> most;  // more would spill in layernorm_backward_kernel
  fits(eight, one) || fits(sixteen, one) || fits(most, one) || fits(sixteen, two) || fits(most, two) ||
      fits(sixteen, four) || fits(most, four) || fits(most, eight);
}
constexpr int64_t kLongestRow = kWarpSize * 24 * 8;  // of by_layout

// ------------------------------------------------------------------------------------------------ any size

/// Any C: a warp per row, value by value. A lane reads back only what it wrote itself.
template <typename T>
__global__ void __launch_bounds__(kBlock) layernorm_forward_any_kernel(const Forward<T> p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t r = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize, at = r * p.C;
  if (r >= p.rows) return;  // the whole warp
  float sum = 0;
  for (int64_t c = at + lane; c < at + p.C; c += kWarpSize) {
    if (p.delta != nullptr) p.x[c] = from_float<T>(to_float(p.residual[c]) + to_float(p.delta[c]));
    sum += to_float(p.x[c]);
  }
  const float mean = warp_sum(sum) / static_cast<float>(p.C);
  float squares = 0;
  for (int64_t c = at + lane; c < at + p.C; c += kWarpSize)
    squares += (to_float(p.x[c]) - mean) * (to_float(p.x[c]) - mean);
  const float rstd = rsqrtf(warp_sum(squares) / static_cast<float>(p.C) + p.eps);
  if (lane == 0) p.mean[r] = mean, p.rstd[r] = rstd;
  for (int64_t c = lane; c < p.C; c += kWarpSize)
    p.y[at + c] = from_float<T>((to_float(p.x[at + c]) - mean) * rstd * p.gain[c] + p.bias[c]);
}

/// The blocks' shares of dgain and dbias: a lane per column, warps and blocks share the rows.
template <typename T>
__global__ void __launch_bounds__(kBlock) layernorm_backward_any_gains_kernel(const Backward<T> p) {
  __shared__ float2 shares[kWarps][kWarpSize];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t c = int64_t{blockIdx.x} * kWarpSize + lane;
  float2 share = make_float2(0, 0);
  for (int64_t r = int64_t{blockIdx.y} * kWarps + warp; c < p.C && r < p.rows; r += gridDim.y * kWarps) {
    const float dy = to_float(p.dy[r * p.C + c]);
    share.x += dy * (to_float(p.x[r * p.C + c]) - p.mean[r]) * p.rstd[r];
    share.y += dy;
  }
  shares[warp][lane] = share;
  __syncthreads();
  if (warp > 0 || c >= p.C) return;
  for (int w = 1; w < kWarps; ++w) share.x += shares[w][lane].x, share.y += shares[w][lane].y;
  p.dgains[blockIdx.y * p.C + c] = share.x;
  p.dbiases[blockIdx.y * p.C + c] = share.y;
}

/// dx: a warp per row. It may be dy's memory, so dgain and dbias are computed before.
template <typename T>
__global__ void __launch_bounds__(kBlock) layernorm_backward_any_kernel(const Backward<T> p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t r = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize, at = r * p.C;
  if (r >= p.rows) return;  // the whole warp
  const float mean = p.mean[r], rstd = p.rstd[r];
  float sum_g = 0, sum_gx = 0;
  for (int64_t c = lane; c < p.C; c += kWarpSize) {
    const float g = p.gain[c] * to_float(p.dy[at + c]);
    sum_g += g;
    sum_gx += g * (to_float(p.x[at + c]) - mean) * rstd;
  }
  const float mean_g = warp_sum(sum_g) / static_cast<float>(p.C);
  const float mean_gx = warp_sum(sum_gx) / static_cast<float>(p.C);
  for (int64_t c = lane; c < p.C; c += kWarpSize) {
    const float xhat = (to_float(p.x[at + c]) - mean) * rstd;
    const float dx = rstd * (p.gain[c] * to_float(p.dy[at + c]) - mean_g - xhat * mean_gx);
    p.dx[at + c] = from_float<T>(p.dresidual != nullptr ? dx + to_float(p.dresidual[at + c]) : dx);
  }
}
}  // namespace

void gpu::layernorm_forward(Context& ctx, const LayernormForward& args) {
  for_float_type(args.x.dtype, [&]<typename T>(T) {
    const Forward<T> p{.y = data_of<T>(args.y),
                       .x = data_of<T>(args.x),
                       .mean = args.mean.f32(),
                       .rstd = args.rstd.f32(),
                       .gain = args.gain.f32(),
                       .bias = args.bias.f32(),
                       .residual = data_of<T>(args.residual),
                       .delta = data_of<T>(args.delta),
                       .rows = args.x.rows(),
                       .C = args.x.cols(),
                       .eps = args.eps};
    if (p.C > kLongestRow || !can_vectorize<T>(p.C, p.y, p.x, p.residual, p.delta, p.gain, p.bias))
      return launch(ctx, {.grid = blocks_for(p.rows, kWarps), .block = kBlock},
                    layernorm_forward_any_kernel<T>, p);
    by_layout(p.C, [&](auto K, auto W) {
      launch(ctx, {.grid = blocks_for(p.rows, kWarps / W), .block = kBlock},
             layernorm_forward_kernel<T, K(), W()>, p);
    });
  });
}

void gpu::layernorm_backward(Context& ctx, const LayernormBackward& args) {
  Scratch::Frame frame(ctx.scratch);
  const int64_t C = args.x.cols();
  const Tensor dgains = frame.tensor({kLayernormBlocks, C}), dbiases = frame.tensor({kLayernormBlocks, C});
  int64_t blocks = 0;
  for_float_type(args.x.dtype, [&]<typename T>(T) {
    const Backward<T> p{.dx = data_of<T>(args.dx),
                        .dy = data_of<T>(args.dy),
                        .x = data_of<T>(args.x),
                        .mean = args.mean.f32(),
                        .rstd = args.rstd.f32(),
                        .gain = args.gain.f32(),
                        .dresidual = data_of<T>(args.dresidual),
                        .dgains = dgains.f32(),
                        .dbiases = dbiases.f32(),
                        .rows = args.x.rows(),
                        .C = C};
    const auto blocks_of = [&](int64_t rows_at_once) {  // four rounds or more each: fewer shares to add up
      blocks = std::min<int64_t>(kLayernormBlocks, blocks_for(p.rows, 4 * rows_at_once));
      return static_cast<unsigned>(blocks);
    };
    if (C > kLongestRow || !can_vectorize<T>(C, p.dx, p.dy, p.x, p.dresidual, p.gain)) {
      launch(ctx, {.grid = {blocks_for(C, kWarpSize), blocks_of(kWarps)}, .block = kBlock},
             layernorm_backward_any_gains_kernel<T>, p);
      return launch(ctx, {.grid = blocks_for(p.rows, kWarps), .block = kBlock},
                    layernorm_backward_any_kernel<T>, p);
    }
    by_layout(C, [&](auto K, auto W) {
      launch(ctx, {.grid = blocks_of(kWarps / W), .block = kBlock, .shared = C * sizeof(float)},
             layernorm_backward_kernel<T, K(), W()>, p);
    });
  });
  static_assert(kLayernormBlocks <= kRowsInOneGo, "bias_backward would need scratch");
  gpu::bias_backward(ctx,
                     {.dbias = args.dgain, .dy = dgains.slice(0, blocks), .accumulate = args.accumulate});
  gpu::bias_backward(ctx,
                     {.dbias = args.dbias, .dy = dbiases.slice(0, blocks), .accumulate = args.accumulate});
}
