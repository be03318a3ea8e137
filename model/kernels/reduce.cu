#include "model/kernels/reduce.h"

#include <vector>

#include "model/kernels/chunks.h"
#include "model/kernels/multiplier.h"
#include "model/kernels/reduce_plan.h"

// Memory-bound. Every sum has two stages: blocks add up parts whose bounds depend on the size alone, then the
// parts are added in a fixed order. All in float64: squares cannot overflow, and even GPUs with one float64
// unit for 64 float32 units add faster than memory delivers.

static_assert(kChunk == kSumChunk);

namespace {
constexpr int kWarps = kChunkThreads / kWarpSize;  // of every block here

// ------------------------------------------------------------------------- whole tensors, for the host

struct Products {
  __device__ static double of(double a, double b) { return a * b; }
  __host__ __device__ static double join(double x, double y) { return x + y; }
};
struct Sizes {
  __device__ static double of(double a, double) { return fabs(a); }
  __host__ __device__ static double join(double x, double y) { return x + y; }
};
struct LargestSize {
  __device__ static double of(double a, double) { return fabs(a); }
  /// A NaN is larger than all.
  __host__ __device__ static double join(double x, double y) { return x > y || x != x ? x : y; }
};

/// parts[block] = the join of Op::of(a[i], b[i]) over the block's part of n elements.
template <typename Op, typename A, typename B>
__global__ void __launch_bounds__(kChunkThreads)
    whole_kernel(double* parts, const A* a, const B* b, int64_t n, int64_t part, bool wide) {
  __shared__ double shared[kWarps];
  const int64_t begin = int64_t{blockIdx.x} * part;
  double mine = 0;
  for_packs({0, begin, begin + part < n ? begin + part : n}, wide, [&](int64_t i, auto width) {
    constexpr int N = decltype(width)::value;
    const Pack<A, N> left = load<A, N>(a + i);
    const Pack<B, N> right = load<B, N>(b + i);
#pragma unroll
    for (int k = 0; k < N; ++k) mine = Op::join(mine, Op::of(to_real(left.v[k]), to_real(right.v[k])));
  });
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    mine = Op::join(mine, __shfl_xor_sync(kFullMask, mine, offset));
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) mine = Op::join(mine, shared[w]);
  parts[blockIdx.x] = mine;
}

template <typename Op>
double whole(Context& ctx, const Tensor& a, const Tensor& b) {
  const int64_t n = a.size(), step = 4 * kChunkThreads;
  if (n == 0) return 0;
  const int64_t part = parts_of(parts_of(n, kWholeParts), step) * step, count = parts_of(n, part);
  Scratch::Frame frame(ctx.scratch);
  double* parts = frame.doubles(count);
  const auto add_up = [&]<typename A, typename B>(A, B) {
    launch(ctx, {.grid = static_cast<unsigned>(count), .block = kChunkThreads}, whole_kernel<Op, A, B>, parts,
           data_of<A>(a), data_of<B>(b), n, part, aligned_for_four(a, b));
  };
  if (a.dtype == DType::f64)
    add_up(double{}, double{});
  else
    for_float_type(a.dtype,
                   [&]<typename A>(A) { for_float_type(b.dtype, [&]<typename B>(B) { add_up(A{}, B{}); }); });
  std::vector<double> here(static_cast<size_t>(count));
  gpu::copy_out(*ctx.device, here.data(), parts, 8 * count);
  double result = 0;
  for (const double value : here) result = Op::join(result, value);
  return result;
}

// ------------------------------------------------------------------------------ sums that stay on the GPU

template <typename T>
struct SumEntry {
  const T* x;
  int64_t n;
  bool wide;
};

template <typename T>
__global__ void __launch_bounds__(kChunkThreads)
    chunk_squares_kernel(double* parts, const __grid_constant__ ChunkTable<SumEntry<T>> table) {
  __shared__ double shared[kWarps];
  const Chunk chunk = chunk_of_block(table);
  const SumEntry<T>& a = table.entries[chunk.index];
  double sum = 0;
  for_packs(chunk, a.wide, [&](int64_t i, auto width) {
    constexpr int N = decltype(width)::value;
    const Pack<T, N> pack = load<T, N>(a.x + i);
#pragma unroll
    for (int k = 0; k < N; ++k) sum += static_cast<double>(pack.v[k]) * pack.v[k];
  });
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

/// sums[i] = the sum of the parts of the table's tensor i, one block each.
template <typename T>
__global__ void __launch_bounds__(kChunkThreads)
    add_parts_kernel(double* sums, const double* parts,
                     const __grid_constant__ ChunkTable<SumEntry<T>> table) {
  __shared__ double shared[kWarps];
  const int i = static_cast<int>(blockIdx.x);
  double sum = 0;
  for (unsigned part = (i > 0 ? table.end[i - 1] : 0) + threadIdx.x; part < table.end[i];
       part += kChunkThreads)
    sum += parts[part];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) sums[i] = sum;
}

constexpr int kMeanThreads = 1024;

__global__ void __launch_bounds__(kMeanThreads)
    mean_kernel(double* out, const float* x, int64_t n, double scale, bool accumulate) {
  __shared__ double shared[kMeanThreads / kWarpSize];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kMeanThreads) sum += x[i];
  sum = block_sum(sum, shared);
  if (threadIdx.x != 0) return;
  const double mean = scale * sum / static_cast<double>(n);
  *out = accumulate ? *out + mean : mean;
}

// ---------------------------------------------------------------------------------------- rows and columns

/// The share of one of `threads` threads in the sum of squares of n elements.
template <typename T>
__device__ __forceinline__ double squares(const T* x, int64_t n, int thread, int threads, bool wide) {
  double sum = 0;
  if (wide) {
    constexpr int N = kPackSize<T>;
    for (int64_t i = int64_t{thread} * N; i < n; i += int64_t{threads} * N) {
      const Pack<T, N> pack = load<T, N>(x + i);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const double value = to_real(pack.v[k]);
        sum += value * value;
      }
    }
  } else {
    for (int64_t i = thread; i < n; i += threads) {
      const double value = to_real(x[i]);
      sum += value * value;
    }
  }
  return sum;
}

/// Short rows: a warp each.
template <typename T>
__global__ void __launch_bounds__(kChunkThreads)
    short_row_norms_kernel(Real<T>* norms, const T* x, int64_t rows, int64_t cols, bool wide) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (row >= rows) return;  // the whole warp
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const double sum = warp_sum(squares(x + row * cols, cols, lane, kWarpSize, wide));
  if (lane == 0) norms[row] = static_cast<Real<T>>(sqrt(sum));
}

/// Long rows: block b adds up part b % parts of row b / parts.
template <typename T>
__global__ void __launch_bounds__(kChunkThreads)
    row_parts_kernel(double* sums, const T* x, int64_t cols, unsigned parts, bool wide) {
  __shared__ double shared[kWarps];
  const int64_t begin = blockIdx.x % parts * kSumChunk;
  const int64_t count = cols - begin < kSumChunk ? cols - begin : kSumChunk;
  const T* from = x + blockIdx.x / parts * cols + begin;
  const double sum =
      block_sum(squares(from, count, static_cast<int>(threadIdx.x), kChunkThreads, wide), shared);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <typename Norm>
__global__ void __launch_bounds__(kChunkThreads)
    finish_row_norms_kernel(Norm* norms, const double* sums, int64_t rows, unsigned parts) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (row >= rows) return;  // the whole warp
  const unsigned lane = threadIdx.x % kWarpSize;
  double sum = 0;
  for (unsigned part = lane; part < parts; part += kWarpSize) sum += sums[row * parts + part];
  sum = warp_sum(sum);
  if (lane == 0) norms[row] = static_cast<Norm>(sqrt(sum));
}

/// A block of kWarps rows of 32 threads: thread (x, y) has column x of its 32 and every kWarps-th row.
struct Tile {
  int64_t col;
  bool inside;
};
__device__ __forceinline__ Tile tile_of(int64_t block, int64_t cols) {
  const int64_t col = block * kWarpSize + threadIdx.x;
  return {col, col < cols};
}

/// Adds a column's sums over the block's rows of threads; the result is in row 0.
__device__ __forceinline__ double sum_over_y(double mine, double (&shared)[kWarps][kWarpSize]) {
  shared[threadIdx.y][threadIdx.x] = mine;
  __syncthreads();
  for (int y = 1; y < kWarps; ++y)
    if (threadIdx.y == 0) mine += shared[y][threadIdx.x];
  return mine;
}

/// sums[slab][col] for slabs of kSlabRows rows; block b has columns b % col_blocks of slab b / col_blocks.
template <typename T>
__global__ void __launch_bounds__(kChunkThreads)
    column_slabs_kernel(double* sums, const T* x, int64_t rows, int64_t cols, unsigned col_blocks) {
  __shared__ double shared[kWarps][kWarpSize];
  const int64_t slab = blockIdx.x / col_blocks;
  const Tile tile = tile_of(blockIdx.x % col_blocks, cols);
  const int64_t end = (slab + 1) * kSlabRows < rows ? (slab + 1) * kSlabRows : rows;
  double sum = 0;
  if (tile.inside)
    for (int64_t r = slab * kSlabRows + threadIdx.y; r < end; r += kWarps) {
      const double value = to_real(x[r * cols + tile.col]);
      sum += value * value;
    }
  sum = sum_over_y(sum, shared);
  if (tile.inside && threadIdx.y == 0) sums[slab * cols + tile.col] = sum;
}

template <typename Norm>
__global__ void __launch_bounds__(kChunkThreads)
    finish_col_norms_kernel(Norm* norms, const double* sums, int64_t slabs, int64_t cols) {
  __shared__ double shared[kWarps][kWarpSize];
  const Tile tile = tile_of(blockIdx.x, cols);
  double sum = 0;
  if (tile.inside)
    for (int64_t slab = threadIdx.y; slab < slabs; slab += kWarps) sum += sums[slab * cols + tile.col];
  sum = sum_over_y(sum, shared);
  if (tile.inside && threadIdx.y == 0) norms[tile.col] = static_cast<Norm>(sqrt(sum));
}

/// What one scaling is told besides its tensors.
template <typename T>
struct Scaling {
  int64_t packs, cols;
  T factor;
  bool divide, by_rows;
  const T* times;  // of rows; may be null
};

/// N elements per thread, all in one row: N > 1 divides cols.
template <typename T, int N>
__global__ void __launch_bounds__(kChunkThreads)
    scale_kernel(T* y, const T* x, const Real<T>* scales, Scaling<Real<T>> how) {
  const int64_t pack_index = int64_t{blockIdx.x} * kChunkThreads + threadIdx.x;
  if (pack_index >= how.packs) return;
  const int64_t i = pack_index * N, row = i / how.cols, col = i - row * how.cols;
  Pack<T, N> pack = load<T, N>(x + i);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const Real<T> scale = scales[how.by_rows ? row : col + k];
    const Multiplier<Real<T>> by = multiplier(scale, how.factor, how.divide);
    const Real<T> last = how.times == nullptr ? Real<T>(1) : how.times[row];
    pack.v[k] = from_real<T>(to_real(pack.v[k]) * by.lift * by.scale * last);
  }
  store<T, N>(y + i, pack);
}

/// ScaleRows or ScaleCols.
template <typename Args>
void scale(Context& ctx, const Args& args, bool by_rows, const Tensor& times) {
  const int64_t n = args.x.size(), cols = args.x.cols();
  if (n == 0) return;
  for_any_float(args.x.dtype, [&]<typename T>(T) {
    T* y = data_of<T>(args.y);
    const T* x = data_of<T>(args.x);
    const bool wide = can_vectorize<T>(cols, x, y);
    const int64_t packs = wide ? n / kPackSize<T> : n;
    launch(ctx, {.grid = blocks_for(packs, kChunkThreads), .block = kChunkThreads},
           wide ? scale_kernel<T, kPackSize<T>> : scale_kernel<T, 1>, y, x, data_of<Real<T>>(args.scales),
           Scaling<Real<T>>{.packs = packs,
                            .cols = cols,
                            .factor = static_cast<Real<T>>(args.factor),
                            .divide = args.divide,
                            .by_rows = by_rows,
                            .times = data_of<Real<T>>(times)});
  });
}
}  // namespace

double gpu::sum_of_squares(Context& ctx, const Tensor& x) {
  return whole<Products>(ctx, x, x);
}

double gpu::dot(Context& ctx, const Tensor& a, const Tensor& b) {
  return whole<Products>(ctx, a, b);
}

double gpu::sum_abs(Context& ctx, const Tensor& x) {
  return whole<Sizes>(ctx, x, x);
}

double gpu::max_abs(Context& ctx, const Tensor& x) {
  return whole<LargestSize>(ctx, x, x);
}

namespace {
template <typename T>
void squares_of_all(Context& ctx, const SumsOfSquares& args) {
  std::vector<SumEntry<T>> entries;
  for (const Tensor& x : args.tensors)
    entries.push_back({.x = data_of<T>(x), .n = x.size(), .wide = aligned_for_four(x)});
  Scratch::Frame frame(ctx.scratch);
  double* parts = frame.doubles(sums_of_squares_scratch_bytes(args.tensors) / 8);
  double* sums = data_of<double>(args.sums);
  for_chunk_tables<SumEntry<T>>(entries, [&](const ChunkTable<SumEntry<T>>& table, unsigned blocks) {
    if (blocks > 0)
      launch(ctx, {.grid = blocks, .block = kChunkThreads}, chunk_squares_kernel<T>, parts, table);
    launch(ctx, {.grid = static_cast<unsigned>(table.count), .block = kChunkThreads}, add_parts_kernel<T>,
           sums, parts, table);
    parts += blocks;
    sums += table.count;
  });
}
}  // namespace

void gpu::sums_of_squares(Context& ctx, const SumsOfSquares& args) {
  if (!args.tensors.empty() && args.tensors[0].dtype == DType::f64) return squares_of_all<double>(ctx, args);
  squares_of_all<float>(ctx, args);
}

void gpu::mean(Context& ctx, const Mean& args) {
  launch(ctx, {.grid = 1, .block = kMeanThreads}, mean_kernel, data_of<double>(args.out),
         data_of<float>(args.x), args.x.size(), args.scale, args.accumulate);
}

void gpu::row_norms(Context& ctx, const RowNorms& args) {
  const int64_t rows = args.x.rows(), cols = args.x.cols();
  if (rows == 0) return;
  const auto parts = static_cast<unsigned>(parts_of(cols, kSumChunk));
  Scratch::Frame frame(ctx.scratch);
  for_any_float(args.x.dtype, [&]<typename T>(T) {
    Real<T>* norms = data_of<Real<T>>(args.norms);
    const T* x = data_of<T>(args.x);
    const bool wide = can_vectorize<T>(cols, x);
    if (cols <= kShortRow)
      return launch(ctx, {.grid = blocks_for(rows, kWarps), .block = kChunkThreads},
                    short_row_norms_kernel<T>, norms, x, rows, cols, wide);
    double* sums = frame.doubles(rows * parts);
    launch(ctx, {.grid = static_cast<unsigned>(rows * parts), .block = kChunkThreads}, row_parts_kernel<T>,
           sums, x, cols, parts, wide);
    launch(ctx, {.grid = blocks_for(rows, kWarps), .block = kChunkThreads}, finish_row_norms_kernel<Real<T>>,
           norms, sums, rows, parts);
  });
}

void gpu::col_norms(Context& ctx, const ColNorms& args) {
  const int64_t rows = args.x.rows(), cols = args.x.cols(), slabs = parts_of(rows, kSlabRows);
  if (args.x.size() == 0) return;
  const unsigned col_blocks = blocks_for(cols, kWarpSize);
  const dim3 block(kWarpSize, kWarps);
  Scratch::Frame frame(ctx.scratch);
  double* sums = frame.doubles(slabs * cols);
  for_any_float(args.x.dtype, [&]<typename T>(T) {
    launch(ctx, {.grid = static_cast<unsigned>(slabs * col_blocks), .block = block}, column_slabs_kernel<T>,
           sums, data_of<T>(args.x), rows, cols, col_blocks);
    launch(ctx, {.grid = col_blocks, .block = block}, finish_col_norms_kernel<Real<T>>,
           data_of<Real<T>>(args.norms), sums, slabs, cols);
  });
}

void gpu::scale_rows(Context& ctx, const ScaleRows& args) {
  scale(ctx, args, /*by_rows=*/true, args.times);
}

void gpu::scale_cols(Context& ctx, const ScaleCols& args) {
  scale(ctx, args, /*by_rows=*/false, {});
}
