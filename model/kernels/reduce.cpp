#include "model/kernels/reduce.h"

#include <algorithm>
#include <array>
#include <functional>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "model/kernels/multiplier.h"
#include "model/kernels/reduce_plan.h"
#include "model/kernels/sums.h"

static_assert(whole_scratch_bytes() == kWholeParts * int64_t{sizeof(double)});

int64_t sums_of_squares_scratch_bytes(std::span<const Tensor> tensors) {
  int64_t parts = 0;
  for (const Tensor& x : tensors) parts += parts_of(x.size(), kSumChunk);
  return parts * int64_t{sizeof(double)};
}

int64_t row_norms_scratch_bytes(int64_t rows, int64_t cols) {
  return cols <= kShortRow ? 0 : rows * parts_of(cols, kSumChunk) * int64_t{sizeof(double)};
}

namespace {
/// Rows of a slab on the CPU: at least 64, so that the sums of a slab are small beside it; at most 64 slabs.
int64_t slab_rows(int64_t rows) {
  return std::max<int64_t>(64, parts_of(parts_of(rows, 64), 64) * 64);
}
}  // namespace

int64_t col_norms_scratch_bytes(int64_t rows, int64_t cols) {
  const int64_t slabs = std::max(parts_of(rows, kSlabRows), parts_of(rows, slab_rows(rows)));
  return cols * std::max<int64_t>(1, slabs) * int64_t{sizeof(double)};
}

namespace {
constexpr int64_t kElementGrain = 16384;  // elements; a thread with fewer costs more than it helps

/// An integer as wide as T.
template <typename T>
using BitsOf = std::conditional_t<std::is_same_v<T, double>, uint64_t, uint32_t>;

/// The largest |x|, as bits. Without the sign bit, floats order like integers, and a NaN is above infinity:
/// it wins, as it should.
template <typename T>
BitsOf<T> largest_bits(const T* x, int64_t n) {
  using Bits = BitsOf<T>;
  constexpr Bits kAllButSign = std::numeric_limits<Bits>::max() / 2;
  Bits largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) largest = std::max<Bits>(largest, std::bit_cast<Bits>(x[i]) & kAllButSign);
  return largest;
}

template <typename T>
double largest_size(Context& ctx, const Tensor& tensor) {
  const T* x = reals_of<T>(tensor);
  BitsOf<T> largest = 0;
  deal_out(ctx, tensor.size(), kElementGrain, [x, &largest](int64_t begin, int64_t end) {
    const BitsOf<T> mine = largest_bits(x + begin, end - begin);
#pragma omp critical(max_abs)  // a maximum does not depend on the order
    largest = std::max(largest, mine);
  });
  return std::bit_cast<T>(largest);
}
}  // namespace

double cpu::sum_of_squares(Context& ctx, const Tensor& tensor) {
  return for_real_type(tensor.dtype, [&]<typename T>(T) {
    const T* x = reals_of<T>(tensor);
    return cpu::sum_by_parts(ctx, tensor.size(), [=](int64_t start, int64_t count) {
      return cpu::sum_of_squares(x + start, count);
    });
  });
}

double cpu::dot(Context& ctx, const Tensor& left, const Tensor& right) {
  return for_real_type(left.dtype, [&]<typename T>(T) {
    const T *a = reals_of<T>(left), *b = reals_of<T>(right);
    return cpu::sum_by_parts(ctx, left.size(), [=](int64_t start, int64_t count) {
      return cpu::sum_of_products(a + start, b + start, count);
    });
  });
}

double cpu::sum_abs(Context& ctx, const Tensor& tensor) {
  return for_real_type(tensor.dtype, [&]<typename T>(T) {
    const T* x = reals_of<T>(tensor);
    return cpu::sum_by_parts(ctx, tensor.size(), [=](int64_t start, int64_t count) {
      return cpu::sum_of_sizes(x + start, count);
    });
  });
}

double cpu::max_abs(Context& ctx, const Tensor& tensor) {
  return for_real_type(tensor.dtype, [&]<typename T>(T) { return largest_size<T>(ctx, tensor); });
}

void cpu::sums_of_squares(Context& ctx, const SumsOfSquares& args) {
  const auto count = std::ssize(args.tensors);
  std::vector<Share> shares;
  std::vector<std::array<double, kMostParts>> parts(args.tensors.size());
  std::vector<std::function<void(int64_t begin, int64_t end)>> add;
  for (int64_t i = 0; i < count; ++i)
    for_real_type(args.tensors[i].dtype, [&]<typename T>(T) {
      const T* x = reals_of<T>(args.tensors[i]);
      const int64_t n = args.tensors[i].size();
      shares.push_back(share_of_sum(n));
      add.emplace_back([=, sums = parts[i].data()](int64_t begin, int64_t end) {
        add_parts(sums, n, begin, end,
                  [=](int64_t start, int64_t size) { return sum_of_squares(x + start, size); });
      });
    });
  deal_out(ctx, shares, [&](int64_t i, int64_t begin, int64_t end) { add[i](begin, end); });
  for (int64_t i = 0; i < count; ++i)
    args.sums.f64()[i] = std::accumulate(parts[i].begin(), parts[i].end(), 0.0);
}

void cpu::mean(Context&, const Mean& args) {
  double sum = 0;
  for (const float x : args.x.floats()) sum += x;
  const double mean = args.scale * sum / static_cast<double>(args.x.size());
  double& out = *args.out.f64();
  out = args.accumulate ? out + mean : mean;
}

namespace {
int64_t row_grain(int64_t cols) {
  return std::max<int64_t>(1, kElementGrain / std::max<int64_t>(1, cols));
}

/// Rows longer than cpu::kLongRow.
template <typename T>
void norms_of_long_rows(Context& ctx, const RowNorms& args) {
  std::vector<Tensor> rows;
  for (int64_t r = 0; r < args.x.rows(); ++r) rows.push_back(args.x.slice(r, 1));
  std::vector<double> sums(rows.size());
  cpu::sums_of_squares(ctx, {.sums = {sums.data(), {args.x.rows()}}, .tensors = rows});
  T* norms = reals_of<T>(args.norms);
  for (const double sum : sums) *norms++ = static_cast<T>(std::sqrt(sum));
}

template <typename T>
void norms_of_rows(Context& ctx, const RowNorms& args) {
  const int64_t cols = args.x.cols();
  if (cols > cpu::kLongRow) return norms_of_long_rows<T>(ctx, args);
  const T* x = reals_of<T>(args.x);
  T* norms = reals_of<T>(args.norms);
  deal_out(ctx, args.x.rows(), row_grain(cols), [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      norms[r] = static_cast<T>(std::sqrt(cpu::sum_of_squares(x + r * cols, cols)));
    }
  });
}

// Columns: their squares are added in sweeps along the rows, by slabs of rows and blocks of columns whose
// bounds depend on the size alone and which threads share; then the slabs' sums are added in order.

constexpr int64_t kSweep = 2048;  // columns of a block, whose sums stay in L1

/// sums[c] += the sum of x[r][c]^2 over rows that begin `stride` elements after each other. Eight rows at
/// once: an eighth of the traffic to the sums.
template <typename T>
void add_squares(double* sums, const T* x, int64_t rows, int64_t width, int64_t stride) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) {
    const T* row = x + r * stride;
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) {
      double sum = sums[c];
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) {
        const double value = row[k * stride + c];
        sum += value * value;
      }
      sums[c] = sum;
    }
  }
  for (; r < rows; ++r) {
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) {
      const double value = x[r * stride + c];
      sums[c] += value * value;
    }
  }
}

/// squares[c] = the sum of x[r][c]^2 over the rows of a slab, for `width` columns of `cols`. Short rows are
/// read as fewer longer ones, 1, 2, 4 .. rows in one, so that memory is read in long stretches.
template <typename T>
void squares_of_slab(double* squares, const T* x, int64_t rows, int64_t width, int64_t cols) {
  double sums[kSweep] = {};
  int64_t joined = 1;
  while (width == cols && 2 * joined * cols <= kSweep) joined *= 2;
  add_squares(sums, x, rows / joined, joined * width, joined * cols);
  const int64_t rest = rows % joined;
  add_squares(sums, x + (rows - rest) * cols, 1, rest * width, cols);
  for (int64_t c = 0; c < width; ++c) {
    squares[c] = 0;
    for (int64_t k = 0; k < joined; ++k) squares[c] += sums[k * cols + c];
  }
}

template <typename T>
void norms_of_cols(Context& ctx, const ColNorms& args) {
  const int64_t rows = args.x.rows(), cols = args.x.cols();
  const int64_t slab = slab_rows(rows), slabs = parts_of(rows, slab), blocks = parts_of(cols, kSweep);
  const T* x = reals_of<T>(args.x);
  T* norms = reals_of<T>(args.norms);
  Scratch::Frame frame(ctx.scratch);
  double* squares = frame.doubles(slabs * cols);
  const int64_t grain = std::max<int64_t>(1, kElementGrain / (slab * std::min(cols, kSweep)));
  deal_out(ctx, slabs * blocks, grain, [=](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t r = task / blocks * slab, c = task % blocks * kSweep;
      squares_of_slab(squares + task / blocks * cols + c, x + r * cols + c, std::min(slab, rows - r),
                      std::min(kSweep, cols - c), cols);
    }
  });
  deal_out(ctx, cols, kElementGrain, [=](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double sum = 0;
      for (int64_t s = 0; s < slabs; ++s) sum += squares[s * cols + c];
      norms[c] = static_cast<T>(std::sqrt(sum));
    }
  });
}

template <typename T>
void scale_by_rows(Context& ctx, const ScaleRows& args) {
  const int64_t cols = args.x.cols();
  const T *x = reals_of<T>(args.x), *scales = reals_of<T>(args.scales), *times = reals_of<T>(args.times);
  T* y = reals_of<T>(args.y);
  const T factor = static_cast<T>(args.factor);
  const bool divide = args.divide;
  const int64_t pieces = std::max<int64_t>(1, parts_of(cols, cpu::kLongRow));  // of a row
  deal_out(ctx, args.x.rows() * pieces, row_grain(cols), [=](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t r = piece / pieces, first = piece % pieces * cpu::kLongRow;
      const Multiplier<T> by = multiplier(scales[r], factor, divide);
      const int64_t stop = r * cols + std::min(cols, first + cpu::kLongRow);
      const T last = times == nullptr ? T(1) : times[r];
#pragma omp simd
      for (int64_t i = r * cols + first; i < stop; ++i) y[i] = x[i] * by.lift * by.scale * last;
    }
  });
}

template <typename T>
void scale_by_cols(Context& ctx, const ScaleCols& args) {
  const int64_t cols = args.x.cols();
  const T *x = reals_of<T>(args.x), *scales = reals_of<T>(args.scales);
  T* y = reals_of<T>(args.y);
  const T factor = static_cast<T>(args.factor);
  const bool divide = args.divide;
  deal_out(ctx, args.x.rows(), row_grain(cols), [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* from = x + r * cols;
      T* to = y + r * cols;
#pragma omp simd
      for (int64_t c = 0; c < cols; ++c) {
        const Multiplier<T> by = multiplier(scales[c], factor, divide);
        to[c] = from[c] * by.lift * by.scale;
      }
    }
  });
}
}  // namespace

void cpu::row_norms(Context& ctx, const RowNorms& args) {
  for_real_type(args.x.dtype, [&]<typename T>(T) { norms_of_rows<T>(ctx, args); });
}

void cpu::col_norms(Context& ctx, const ColNorms& args) {
  for_real_type(args.x.dtype, [&]<typename T>(T) { norms_of_cols<T>(ctx, args); });
}

void cpu::scale_rows(Context& ctx, const ScaleRows& args) {
  for_real_type(args.x.dtype, [&]<typename T>(T) { scale_by_rows<T>(ctx, args); });
}

void cpu::scale_cols(Context& ctx, const ScaleCols& args) {
  for_real_type(args.x.dtype, [&]<typename T>(T) { scale_by_cols<T>(ctx, args); });
}
