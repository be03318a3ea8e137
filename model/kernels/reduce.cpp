#include "model/kernels/reduce.h"

#include <array>

#include "model/kernels/simd.h"

namespace {
constexpr int64_t kParts = 256;      // partial sums of a whole tensor, whatever its size: no memory to reserve
constexpr int64_t kPartGrain = 1024;  // elements; a part is a multiple
constexpr int64_t kElementGrain = 16384;  // elements; a thread with fewer costs more than it helps

/// The sum of f(i) over [begin, end) in float64. Four running sums, because a float64 addition takes four cycles and
/// one sum alone would wait for them.
template <typename Term>
double sum_range(int64_t begin, int64_t end, Term&& f) {
  const int64_t quarter = (end - begin) / 4;
  double s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = begin; i < begin + quarter; ++i) {
    s0 += f(i);
    s1 += f(i + quarter);
    s2 += f(i + 2 * quarter);
    s3 += f(i + 3 * quarter);
  }
  for (int64_t i = begin + 4 * quarter; i < end; ++i) s0 += f(i);
  return (s0 + s1) + (s2 + s3);
}

/// The sum of f(i) over [0, n), cut into parts by n alone.
template <typename Term>
double sum_all(const Context& ctx, int64_t n, Term&& f) {
  const int64_t part = std::max(kPartGrain, (n / kParts + kPartGrain) / kPartGrain * kPartGrain);
  const int64_t parts = (n + part - 1) / part;
  std::array<double, kParts> sums{};
  parallel_for(ctx, parts, kElementGrain / kPartGrain, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p)
      sums[static_cast<size_t>(p)] = sum_range(p * part, std::min(n, (p + 1) * part), f);
  });
  double sum = 0;
  for (int64_t p = 0; p < parts; ++p) sum += sums[static_cast<size_t>(p)];
  return sum;
}
}  // namespace

double cpu::sum_of_squares(Context& ctx, const Tensor& tensor) {
  const float* x = tensor.f32();
  return sum_all(ctx, tensor.size(), [x](int64_t i) { return static_cast<double>(x[i]) * x[i]; });
}

double cpu::dot(Context& ctx, const Tensor& left, const Tensor& right) {
  const float* a = left.f32();
  const float* b = right.f32();
  return sum_all(ctx, left.size(), [a, b](int64_t i) { return static_cast<double>(a[i]) * b[i]; });
}

float cpu::max_abs(Context& ctx, const Tensor& tensor) {
  // Without the sign bit, floats order like integers, and a NaN is above infinity: it wins, as it should.
  const float* x = tensor.f32();
  uint32_t largest = 0;
  parallel_for(ctx, tensor.size(), kElementGrain, [&](int64_t begin, int64_t end, int) {
    uint32_t mine = 0;
#pragma omp simd reduction(max : mine)
    for (int64_t i = begin; i < end; ++i) mine = std::max(mine, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
#pragma omp critical(max_abs)  // a maximum does not depend on the order
    largest = std::max(largest, mine);
  });
  return std::bit_cast<float>(largest);
}

void cpu::row_norms(Context& ctx, const RowNorms& args) {
  const int64_t rows = args.x.rows(), cols = args.x.cols();
  const float* x = args.x.f32();
  float* norms = args.norms.f32();
  const int64_t grain = std::max<int64_t>(1, kElementGrain / std::max<int64_t>(1, cols));
  parallel_for(ctx, rows, grain, [=](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const double squares =
          sum_range(r * cols, (r + 1) * cols, [x](int64_t i) { return static_cast<double>(x[i]) * x[i]; });
      norms[r] = static_cast<float>(std::sqrt(squares));
    }
  });
}

void cpu::col_norms(Context& ctx, const ColNorms& args) {
  const int64_t rows = args.x.rows(), cols = args.x.cols();
  const float* x = args.x.f32();
  float* norms = args.norms.f32();
  Scratch::Frame frame(ctx.scratch);
  double* squares = frame.doubles(cols);
  // Threads share the columns, so that the order of the additions does not depend on their number.
  parallel_for(ctx, cols, 16, [=](int64_t begin, int64_t end, int) {
    std::fill(squares + begin, squares + end, 0.0);
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = x + r * cols;
#pragma omp simd
      for (int64_t c = begin; c < end; ++c) squares[c] += static_cast<double>(row[c]) * row[c];
    }
#pragma omp simd
    for (int64_t c = begin; c < end; ++c) norms[c] = static_cast<float>(std::sqrt(squares[c]));
  });
}

namespace {
/// What to multiply with: factor s, or factor / s and 0 where s is 0.
inline float multiplier(float scale, float factor, bool divide) {
  if (!divide) return factor * scale;
  return scale == 0.0f ? 0.0f : factor / scale;
}
}  // namespace

void cpu::scale_rows(Context& ctx, const ScaleRows& args) {
  const int64_t rows = args.x.rows(), cols = args.x.cols();
  const float* x = args.x.f32();
  const float* scales = args.scales.f32();
  float* y = args.y.f32();
  const int64_t grain = std::max<int64_t>(1, kElementGrain / std::max<int64_t>(1, cols));
  parallel_for(ctx, rows, grain, [=, factor = args.factor, divide = args.divide](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const float scale = multiplier(scales[r], factor, divide);
#pragma omp simd
      for (int64_t i = r * cols; i < (r + 1) * cols; ++i) y[i] = x[i] * scale;
    }
  });
}

void cpu::scale_cols(Context& ctx, const ScaleCols& args) {
  const int64_t rows = args.x.rows(), cols = args.x.cols();
  const float* x = args.x.f32();
  const float* scales = args.scales.f32();
  float* y = args.y.f32();
  const int64_t grain = std::max<int64_t>(1, kElementGrain / std::max<int64_t>(1, cols));
  parallel_for(ctx, rows, grain, [=, factor = args.factor, divide = args.divide](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const float* from = x + r * cols;
      float* to = y + r * cols;
#pragma omp simd
      for (int64_t c = 0; c < cols; ++c) to[c] = from[c] * multiplier(scales[c], factor, divide);
    }
  });
}
