#include "model/kernels/bias.h"

#include "model/kernels/packs.cuh"

// Tall blocks of rows are summed by as many thread blocks as a GPU needs to be busy, each into a row of
// partial sums; one more launch sums those. Few rows are summed by the second kind of launch alone.

namespace {
/// Sums of the columns of `rows_per_block` rows of x (rows, N), by a block of kWarps warps and 32 * P
/// columns: block (i, j) takes columns from 32 * P * i and rows from rows_per_block * j, into out[j] (N).
/// Warp w adds rows w, w + kWarps ...; then the sums of the warps are added in order.
template <typename T, int P, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    column_sums_kernel(float* out, const T* x, int64_t rows, int64_t N, int64_t rows_per_block,
                       bool accumulate) {
  constexpr int kUnroll = 4;                                     // loads in flight per thread
  constexpr int kRow = kWarpSize + (P > 1 ? kWarpSize / P : 0);  // so that neither side collides in banks
  __shared__ float sums[kWarps][P][kRow];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t first_col = int64_t{blockIdx.x} * kWarpSize * P, col = first_col + lane * P;
  const int64_t begin = blockIdx.y * rows_per_block;
  const int64_t end = begin + rows_per_block < rows ? begin + rows_per_block : rows;

  Floats<P> sum{};
  if (col < N) {
    int64_t r = begin + warp;
    for (; r + (kUnroll - 1) * kWarps < end; r += kUnroll * kWarps) {
      Floats<P> row[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) row[i] = load_floats<P>(x + (r + i * kWarps) * N + col);
#pragma unroll
      for (int i = 0; i < kUnroll; ++i)
#pragma unroll
        for (int k = 0; k < P; ++k) sum.v[k] += row[i].v[k];
    }
    for (; r < end; r += kWarps) {
      const Floats<P> row = load_floats<P>(x + r * N + col);
#pragma unroll
      for (int k = 0; k < P; ++k) sum.v[k] += row.v[k];
    }
  }
#pragma unroll
  for (int k = 0; k < P; ++k) sums[warp][k][lane] = sum.v[k];
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kWarpSize * P; i += kWarps * kWarpSize) {
    const int64_t c = first_col + i;
    if (c >= N) break;
    float total = accumulate ? out[blockIdx.y * N + c] : 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += sums[w][i % P][i / P];
    out[blockIdx.y * N + c] = total;
  }
}

/// All rows at once: narrow columns and many warps each, as there are few rows.
template <typename T>
void sum_in_one_go(Context& ctx, const Tensor& out, const T* x, int64_t rows, bool accumulate) {
  constexpr int kWarps = 32;
  launch(ctx, {.grid = blocks_for(out.size(), kWarpSize), .block = kWarps * kWarpSize},
         column_sums_kernel<T, 1, kWarps>, out.f32(), x, rows, out.size(), rows, accumulate);
}
}  // namespace

void gpu::bias_backward(Context& ctx, const BiasBackward& args) {
  const int64_t rows = args.dy.rows(), N = args.dy.cols();
  for_float_type(args.dy.dtype, [&]<typename T>(T) {
    const T* dy = data_of<T>(args.dy);
    if (rows <= kRowsInOneGo) return sum_in_one_go(ctx, args.dbias, dy, rows, args.accumulate);
    constexpr int kWarps = 8;
    const int64_t per_block = bias_backward_rows_per_block(rows);
    const unsigned blocks = blocks_for(rows, per_block);
    Scratch::Frame frame(ctx.scratch);
    float* partials = frame.floats(blocks * N);
    by_width<T>(can_vectorize<T>(N, dy), [&](auto P) {
      launch(ctx, {.grid = {blocks_for(N, kWarpSize * P), blocks}, .block = kWarps * kWarpSize},
             column_sums_kernel<T, P(), kWarps>, partials, dy, rows, N, per_block, false);
    });
    sum_in_one_go(ctx, args.dbias, static_cast<const float*>(partials), blocks, args.accumulate);
  });
}
