#include "model/kernels/cast.h"

#include "model/kernels/packs.cuh"

namespace {
constexpr int kBlock = 256;

template <int N, typename To, typename From>
__global__ void __launch_bounds__(kBlock) cast_kernel(To* y, const From* x, int64_t packs) {
  const int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (i < packs) store_floats<N>(y + i * N, load_floats<N, Caching::stream>(x + i * N));
}

/// Between f32 and f64: rare, one element a thread.
template <typename To, typename From>
__global__ void __launch_bounds__(kBlock) cast_wide_kernel(To* y, const From* x, int64_t n) {
  const int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (i < n) y[i] = static_cast<To>(x[i]);
}

template <typename To, typename From>
void cast_wide(Context& ctx, const Cast& args) {
  const int64_t n = args.x.size();
  launch(ctx, {.grid = blocks_for(n, kBlock), .block = kBlock}, cast_wide_kernel<To, From>,
         data_of<To>(args.y), data_of<From>(args.x), n);
}

// A tile goes through shared memory, so that both sides see whole cache lines. Its rows are one 4-byte bank
// longer than they need be: then the values of a column lie in different banks.
constexpr int kTile = 64;

/// A block per tile; warps take rows of x, then rows of y. Moves bits: T is an unsigned integer as wide as
/// the numbers.
template <typename T>
__global__ void __launch_bounds__(kBlock)
    transpose_kernel(T* y, const T* x, int64_t rows, int64_t cols, int64_t row_tiles, int64_t col_tiles) {
  __shared__ T tile[kTile][kTile + 4 / sizeof(T)];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t matrix = int64_t{blockIdx.x} / (row_tiles * col_tiles) * rows * cols;
  const int64_t r0 = int64_t{blockIdx.x} / col_tiles % row_tiles * kTile;
  const int64_t c0 = int64_t{blockIdx.x} % col_tiles * kTile;
#pragma unroll
  for (int i = warp; i < kTile; i += kBlock / kWarpSize)
#pragma unroll
    for (int j = lane; j < kTile; j += kWarpSize)
      if (r0 + i < rows && c0 + j < cols) tile[i][j] = x[matrix + (r0 + i) * cols + c0 + j];
  __syncthreads();
#pragma unroll
  for (int i = warp; i < kTile; i += kBlock / kWarpSize)
#pragma unroll
    for (int j = lane; j < kTile; j += kWarpSize)
      if (c0 + i < cols && r0 + j < rows) y[matrix + (c0 + i) * rows + r0 + j] = tile[j][i];
}
}  // namespace

void gpu::cast(Context& ctx, const Cast& args) {
  if (args.x.size() == 0) return;
  const bool from_wide = args.x.dtype == DType::f64, to_wide = args.y.dtype == DType::f64;
  if (from_wide && to_wide) return cast_wide<double, double>(ctx, args);
  if (from_wide) return cast_wide<float, double>(ctx, args);
  if (to_wide) return cast_wide<double, float>(ctx, args);
  for_float_type(args.x.dtype, [&]<typename From>(From) {
    for_float_type(args.y.dtype, [&]<typename To>(To) {
      const From* x = data_of<From>(args.x);
      To* y = data_of<To>(args.y);
      const int64_t n = args.x.size();
      by_width<bf16>(can_vectorize<bf16>(n, x, y), [&](auto N) {
        launch(ctx, {.grid = blocks_for(n / N, kBlock), .block = kBlock}, cast_kernel<N(), To, From>, y, x,
               n / N);
      });
    });
  });
}

void gpu::transpose(Context& ctx, const Transpose& args) {
  const int64_t cols = args.x.cols(), rows = args.y.cols(), batch = args.x.size() / (rows * cols);
  const int64_t row_tiles = blocks_for(rows, kTile), col_tiles = blocks_for(cols, kTile);
  for_float_type(args.x.dtype, [&]<typename T>(T) {
    using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
    launch(ctx, {.grid = static_cast<unsigned>(batch * row_tiles * col_tiles), .block = kBlock},
           transpose_kernel<Bits>, reinterpret_cast<Bits*>(data_of<T>(args.y)),
           reinterpret_cast<const Bits*>(data_of<T>(args.x)), rows, cols, row_tiles, col_tiles);
  });
}
