#include "optim/lines.h"

#include <type_traits>

#include "model/kernels/simd.h"

// Two passes measure a line (its largest entry, then the sum of powers), a third writes its dual. A row is
// reduced by itself; columns go in tiles, so that memory is read along the rows. Threads share whole lines.

namespace {
constexpr int64_t kEntryGrain = 16384;  // entries; a thread with fewer costs more than it helps
constexpr int64_t kTile = 64;           // columns that are worked on together

/// |x| as an integer of its size: ordered as the floats are, but a NaN is above infinity. It wins, as it
/// should.
template <typename T>
auto size_bits(T x) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  return std::bit_cast<Bits>(x) & (~Bits{0} >> 1);
}

/// Calls body(power) with power(r) = r^e for r >= 0, where 0^0 is 0. Only the last of these is a call, which
/// stops vectorisation.
template <typename Body>
void with_power(double e, const Body& body) {
  if (e == 0) return body([](double r) { return r > 0 ? 1.0 : 0.0; });
  if (e == 0.5) return body([](double r) { return std::sqrt(r); });
  if (e == 1) return body([](double r) { return r; });
  if (e == 1.5) return body([](double r) { return r * std::sqrt(r); });
  if (e == 2) return body([](double r) { return r * r; });
  if (e == 3) return body([](double r) { return r * r * r; });
  body([e](double r) { return std::pow(r, e); });
}

/// What a line is divided by: a line of zeros stays one.
double divisor_of(double largest) {
  return largest > 0 ? largest : 1;
}

/// ||x||_q from the largest |x| and sum (|x| / largest)^q.
double norm_of(double largest, double sum, double q) {
  return std::isfinite(largest) ? largest * std::pow(sum, 1 / q) : largest;
}

/// y = gain sign(x) (|x| / divisor)^(q-1)
struct Dual {
  double divisor, gain;
};
Dual dual_of(double largest, double sum, double q, double factor) {
  if (largest == 0) return {1, 0};
  if (!std::isfinite(largest)) return {1, std::numeric_limits<double>::quiet_NaN()};
  // For sign(x) a tiny ratio must not become 0.
  return {q == 1 ? 1 : largest, factor * std::pow(sum, 1 / q - 1)};
}

/// +size or -size, as x says.
template <typename T>
T signed_as(T x, double size) {
  return static_cast<T>(x < 0 ? -size : size);
}

// ------------------------------------------------------------------------------------------------------ a
// row

template <typename T>
double largest_of_row(const T* x, int64_t n) {
  auto largest = size_bits(T{0});
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, size_bits(x[i]));
  return std::bit_cast<T>(largest);
}

/// sum (|x| / largest)^q; 1 when q is infinite.
template <typename T>
double sum_of_row(const T* x, int64_t n, double largest, double q) {
  if (std::isinf(q)) return 1;
  const double divisor = divisor_of(largest);
  double sum = 0;
  with_power(q, [&](auto power) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += power(std::fabs(static_cast<double>(x[i])) / divisor);
  });
  return sum;
}

template <typename T>
void dualize_row(T* y, const T* x, int64_t n, double q, double factor) {
  const double largest = largest_of_row(x, n);
  const Dual dual = dual_of(largest, sum_of_row(x, n, largest, q), q, factor);
  if (std::isinf(q)) {
    const T* first = std::find_if(x, x + n, [=](T entry) { return std::fabs(entry) == largest; });
    const int64_t hit = first - x;
    const T value = hit < n ? signed_as(x[hit], dual.gain) : T{0};
    std::fill(y, y + n, static_cast<T>(0 * dual.gain));  // a NaN stays
    if (hit < n) y[hit] = value;
    return;
  }
  with_power(q - 1, [&](auto power) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      y[i] = signed_as(x[i], dual.gain * power(std::fabs(static_cast<double>(x[i])) / dual.divisor));
  });
}

// ---------------------------------------------------------------------------------------------- tiles of
// columns

/// Up to kTile columns of a matrix, and what is known of each.
template <typename T>
struct Tile {
  const T* x;  // of the first row
  int64_t rows, cols, width;
  double largest[kTile], sum[kTile];
};

template <typename T>
void measure(Tile<T>& tile, double q) {
  decltype(size_bits(T{})) largest[kTile] = {};
  for (int64_t r = 0; r < tile.rows; ++r) {
    const T* x = tile.x + r * tile.cols;
#pragma omp simd
    for (int64_t c = 0; c < tile.width; ++c) largest[c] = std::max(largest[c], size_bits(x[c]));
  }
  double divisor[kTile];
  for (int64_t c = 0; c < tile.width; ++c) {
    tile.largest[c] = std::bit_cast<T>(largest[c]);
    tile.sum[c] = std::isinf(q) ? 1 : 0;
    divisor[c] = divisor_of(tile.largest[c]);
  }
  if (std::isinf(q)) return;
  with_power(q, [&](auto power) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const T* x = tile.x + r * tile.cols;
#pragma omp simd
      for (int64_t c = 0; c < tile.width; ++c)
        tile.sum[c] += power(std::fabs(static_cast<double>(x[c])) / divisor[c]);
    }
  });
}

/// One-hot: the first entry of the largest size in every column.
template <typename T>
void write_largest(T* to, const Tile<T>& tile, const double* gain) {
  T wanted[kTile];
  for (int64_t c = 0; c < tile.width; ++c) wanted[c] = static_cast<T>(tile.largest[c]);
  for (int64_t r = 0; r < tile.rows; ++r) {
    const T* x = tile.x + r * tile.cols;
    T* y = to + r * tile.cols;
#pragma omp simd
    for (int64_t c = 0; c < tile.width; ++c) {
      const bool hit = std::fabs(x[c]) == wanted[c];
      wanted[c] = hit ? T{-1} : wanted[c];  // found: no size is -1
      y[c] = signed_as(x[c], (hit ? 1.0 : 0.0) * gain[c]);
    }
  }
}

template <typename T>
void dualize_tile(T* to, Tile<T>& tile, double q, double factor) {
  measure(tile, q);
  double divisor[kTile], gain[kTile];
  for (int64_t c = 0; c < tile.width; ++c) {
    const Dual dual = dual_of(tile.largest[c], tile.sum[c], q, factor);
    divisor[c] = dual.divisor, gain[c] = dual.gain;
  }
  if (std::isinf(q)) return write_largest(to, tile, gain);
  with_power(q - 1, [&](auto power) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const T* x = tile.x + r * tile.cols;
      T* y = to + r * tile.cols;
#pragma omp simd
      for (int64_t c = 0; c < tile.width; ++c)
        y[c] = signed_as(x[c], gain[c] * power(std::fabs(static_cast<double>(x[c])) / divisor[c]));
    }
  });
}

// ------------------------------------------------------------------------------------------------ whole
// tensors

/// Calls body(row) for every row of a batch, numbered through.
template <typename Body>
void for_rows(const Context& ctx, const LineLayout& at, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kEntryGrain / std::max<int64_t>(1, at.length));
  deal_out(ctx, at.matrices * at.lines, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

/// Calls body(tile, first line of the tile, offset of its first element) for all columns of a batch. Where
/// tiles begin depends on the shape alone.
template <typename T, typename Body>
void for_tiles(const Context& ctx, const T* x, const LineLayout& at, const Body& body) {
  const int64_t tiles = (at.lines + kTile - 1) / kTile;
  const int64_t grain = std::max<int64_t>(1, kEntryGrain / kTile / std::max<int64_t>(1, at.length));
  deal_out(ctx, at.matrices * tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t matrix = i / tiles, col = i % tiles * kTile;
      const int64_t offset = matrix * at.length * at.lines + col;
      Tile<T> tile;
      tile.x = x + offset;
      tile.rows = at.length, tile.cols = at.lines, tile.width = std::min(kTile, at.lines - col);
      body(tile, matrix * at.lines + col, offset);
    }
  });
}

template <typename T>
void norms_of_lines(Context& ctx, const LineNorms& args, T* norms, const T* x) {
  const LineLayout at = line_layout(args.x.shape, args.lines);
  if (args.lines == Lines::rows)
    return for_rows(ctx, at, [&](int64_t row) {
      const T* from = x + row * at.length;
      const double largest = largest_of_row(from, at.length);
      norms[row] = static_cast<T>(norm_of(largest, sum_of_row(from, at.length, largest, args.q), args.q));
    });
  for_tiles(ctx, x, at, [&](Tile<T>& tile, int64_t line, int64_t) {
    measure(tile, args.q);
    for (int64_t c = 0; c < tile.width; ++c)
      norms[line + c] = static_cast<T>(norm_of(tile.largest[c], tile.sum[c], args.q));
  });
}

template <typename T>
void duals_of_lines(Context& ctx, const LineDuals& args, T* y, const T* x) {
  const LineLayout at = line_layout(args.x.shape, args.lines);
  if (args.lines == Lines::rows)
    return for_rows(ctx, at, [&](int64_t row) {
      dualize_row(y + row * at.length, x + row * at.length, at.length, args.q, args.factor);
    });
  for_tiles(ctx, x, at, [&](Tile<T>& tile, int64_t, int64_t offset) {
    dualize_tile(y + offset, tile, args.q, args.factor);
  });
}
}  // namespace

void cpu::line_norms(Context& ctx, const LineNorms& args) {
  if (args.x.dtype == DType::f64) return norms_of_lines(ctx, args, args.norms.f64(), args.x.f64());
  norms_of_lines(ctx, args, args.norms.f32(), args.x.f32());
}

void cpu::line_duals(Context& ctx, const LineDuals& args) {
  if (args.x.dtype == DType::f64) return duals_of_lines(ctx, args, args.y.f64(), args.x.f64());
  duals_of_lines(ctx, args, args.y.f32(), args.x.f32());
}
