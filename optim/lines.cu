#include "optim/lines.h"

#include "model/kernels/cuda.h"

// A block owns its lines from the first read to the last write: one row, or kTileColumns columns beside each
// other, so that a row of the matrix is read in whole memory sectors. It passes over them two or three times:
// the largest entry, the sum of powers, the dual; after the first time they come from the caches. All in
// float64: (tiny / largest)^0.1 is not small, and float32 would have lost it.

namespace {
constexpr int kRowThreads = 128;
constexpr int kTileThreads = 512, kTileColumns = 16;

/// The block's lines, and this thread's share in one of them: every kShares-th entry, or pack of N.
template <int kThreads, int kLines>
struct Share {
  static constexpr int kShares = kThreads / kLines;
  int line, share;
  int64_t length, along;
  __device__ Share(const LineLayout& at, int64_t first)
      : line(static_cast<int>(threadIdx.x) % kLines),
        share(static_cast<int>(threadIdx.x) / kLines),
        length(first + line < at.lines ? at.length : 0),
        along(at.along) {}

  /// Calls body(i, element) for entries i .. i + N - 1, which are N elements from `element` on.
  template <int N, typename Body>
  __device__ __forceinline__ void for_packs(Body&& body) const {
#pragma unroll 2
    for (int64_t i = int64_t{share} * N; i < length; i += int64_t{kShares} * N) body(i, i * along);
  }

  /// Joins what the threads of a line have, in a fixed order; all of them get the result.
  template <typename Join>
  __device__ __forceinline__ double reduce(double mine, double* shared, Join&& join) const {
    shared[threadIdx.x] = mine;
    __syncthreads();
    for (int step = kShares / 2; step > 0; step /= 2) {
      if (share < step)
        shared[threadIdx.x] =
            join(shared[threadIdx.x], shared[static_cast<int>(threadIdx.x) + step * kLines]);
      __syncthreads();
    }
    const double result = shared[line];
    __syncthreads();
    return result;
  }
};

/// r^e for r >= 0, where 0^0 is 0; without pow where it can be.
__device__ __forceinline__ double power(double r, double e) {
  if (e == 0) return r > 0 ? 1 : 0;
  if (e == 1) return r;
  if (e == 2) return r * r;
  return pow(r, e);
}

struct LineTask {
  LineLayout at;
  unsigned blocks;  // of one matrix
  double q, factor;
};

/// Writes the norms of the block's lines, or, without memory for them, their duals.
template <typename T, int N, int kThreads, int kLines>
__global__ void __launch_bounds__(kThreads) lines_kernel(T* norms, T* y, const T* x, LineTask task) {
  __shared__ double shared[kThreads];
  const LineLayout& at = task.at;
  const double q = task.q;
  const bool by_largest = isinf(q);
  const int64_t matrix = blockIdx.x / task.blocks, first = int64_t{blockIdx.x % task.blocks} * kLines;
  const Share<kThreads, kLines> mine(at, first);
  const int64_t start = matrix * at.lines * at.length + (first + mine.line) * at.across;
  const T* from = x + start;

  double largest = 0;
  const auto larger = [](double a, double b) { return a > b || a != a ? a : b; };  // a NaN wins
  mine.template for_packs<N>([&](int64_t, int64_t element) {
    const Pack<T, N> pack = load<T, N>(from + element);
#pragma unroll
    for (int k = 0; k < N; ++k) largest = larger(fabs(static_cast<double>(pack.v[k])), largest);
  });
  largest = mine.reduce(largest, shared, larger);
  const double divisor = largest > 0 ? largest : 1;

  // sum (|x| / largest)^q, or the first of the largest entries: float64 counts far enough.
  double sum = by_largest ? static_cast<double>(at.length) : 0;
  mine.template for_packs<N>([&](int64_t i, int64_t element) {
    const Pack<T, N> pack = load<T, N>(from + element);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const double size = fabs(static_cast<double>(pack.v[k]));
      if (!by_largest)
        sum += power(size / divisor, q);
      else if (size == largest)
        sum = fmin(sum, static_cast<double>(i + k));
    }
  });
  sum = mine.reduce(sum, shared, [=](double a, double b) { return by_largest ? fmin(a, b) : a + b; });

  const bool finite = largest - largest == 0;
  if (norms != nullptr) {
    if (mine.share == 0 && first + mine.line < at.lines)
      norms[matrix * at.lines + first + mine.line] =
          static_cast<T>(by_largest || !finite ? largest : largest * pow(sum, 1 / q));
    return;
  }
  double gain = task.factor * (by_largest || largest == 0 ? 1 : pow(sum, 1 / q - 1));
  if (!finite) gain += largest - largest;     // NaN
  const double scale = q == 1 ? 1 : divisor;  // for sign(x) a tiny ratio must not become 0
  mine.template for_packs<N>([&](int64_t i, int64_t element) {
    Pack<T, N> pack = load<T, N>(from + element);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const double value = static_cast<double>(pack.v[k]), size = fabs(value);
      const double part = !by_largest                                     ? power(size / scale, q - 1)
                          : sum == static_cast<double>(i + k) && size > 0 ? 1
                                                                          : 0;
      pack.v[k] = static_cast<T>(value < 0 ? -gain * part : gain * part);
    }
    store<T, N>(y + start + element, pack);
  });
}

template <typename T>
void run(Context& ctx, T* norms, T* y, const T* x, const Shape& shape, Lines lines, double q, double factor) {
  LineTask task{.at = line_layout(shape, lines), .blocks = 0, .q = q, .factor = factor};
  const LineLayout& at = task.at;
  const bool rows = lines == Lines::rows;
  task.blocks = blocks_for(at.lines, rows ? 1 : kTileColumns);
  const Launch how{.grid = static_cast<unsigned>(at.matrices * task.blocks),
                   .block = static_cast<unsigned>(rows ? kRowThreads : kTileThreads)};
  if (!rows) return launch(ctx, how, lines_kernel<T, 1, kTileThreads, kTileColumns>, norms, y, x, task);
  constexpr int N = kPackSize<T>;
  const bool wide = can_vectorize<T>(at.length, x, y);
  launch(ctx, how, wide ? lines_kernel<T, N, kRowThreads, 1> : lines_kernel<T, 1, kRowThreads, 1>, norms, y,
         x, task);
}

void run(Context& ctx, const Tensor& norms, const Tensor& y, const Tensor& x, Lines lines, double q,
         double factor) {
  if (x.dtype == DType::f64)
    return run(ctx, data_of<double>(norms), data_of<double>(y), data_of<double>(x), x.shape, lines, q,
               factor);
  run(ctx, data_of<float>(norms), data_of<float>(y), data_of<float>(x), x.shape, lines, q, factor);
}
}  // namespace

void gpu::line_norms(Context& ctx, const LineNorms& args) {
  run(ctx, args.norms, {}, args.x, args.lines, args.q, 1);
}

void gpu::line_duals(Context& ctx, const LineDuals& args) {
  run(ctx, {}, args.y, args.x, args.lines, args.q, args.factor);
}
