// Products and copies of tiles: matrices so small that they stay in the cache of one core.
//
// A product of two large matrices goes to oneDNN (matmul.h). Attention multiplies tiles that were made a
// moment ago and are used up a moment later; a library call per tile costs as much as the arithmetic, and
// knows nothing of triangles. Here a block of C stays in registers while k runs: each vector of B that is
// loaded meets kRows numbers of A, each number of A meets kVectors vectors of B.
//
// Vectors are the compiler's own (GCC and clang `vector_size`), so that one source serves AVX-512, AVX2 and
// others.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

namespace tile {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;  // floats per vector
inline constexpr int kRows = 8;    // block of C in registers: 8 rows of 2 vectors, out of 32 registers
#elif defined(__AVX__)
inline constexpr int kLanes = 8;
inline constexpr int kRows = 6;  // 6 rows of 2 vectors, out of 16 registers
#else
inline constexpr int kLanes = 4;
inline constexpr int kRows = 6;
#endif
inline constexpr int kVectors = 2;

using Vector = float __attribute__((vector_size(kLanes * sizeof(float))));
/// The same vector anywhere in memory, on a float's alignment.
using LooseVector = float __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

inline Vector load(const float* p) {
  return *reinterpret_cast<const LooseVector*>(p);
}
inline void store(float* p, Vector v) {
  *reinterpret_cast<LooseVector*>(p) = v;
}
/// The first n < kLanes floats at p, then zeros.
inline Vector load_first(const float* p, int64_t n) {
  Vector v{};
  std::memcpy(&v, p, static_cast<size_t>(n) * sizeof(float));
  return v;
}
/// Stores the first n < kLanes lanes.
inline void store_first(float* p, Vector v, int64_t n) {
  std::memcpy(p, &v, static_cast<size_t>(n) * sizeof(float));
}
/// n rounded up to whole vectors.
inline int64_t padded(int64_t n) {
  return (n + kLanes - 1) / kLanes * kLanes;
}

/// Which part of a square tile on the diagonal counts. Parts that do not are skipped in whole blocks only, so
/// the caller zeroes A above (or below) the diagonal within a block, and ignores C above it.
enum class Triangle : uint8_t {
  none,     // everything counts
  lower_c,  // C_ij is wanted for j <= i
  lower_a,  // A_ik = 0 for k > i
  upper_a,  // A_ik = 0 for k < i
};

/// C (M, N) = A (M, K) B (K, N), or C += A B. A has any strides, so a transposed A costs nothing; B and C are
/// row-major with rows of `ldb` and `ldc` floats. N is a multiple of kLanes. Every element is one chain of
/// fused multiply-adds over k = 0, 1, ...: the same bits wherever in a tile it is computed.
struct Product {
  float* c;
  int64_t ldc;
  const float* a;
  int64_t a_row, a_col;  // A_ik = a[i * a_row + k * a_col]
  const float* b;
  int64_t ldb;
  int64_t M, N, K;
  bool add;  // C += A B
  Triangle triangle = Triangle::none;
};

/// Rows [i, i + ROWS) and vectors [j, j + VECTORS * kLanes) of C. The loops over rows and vectors are
/// unrolled by order: left to itself the compiler moves the sums through the stack on their way in and out.
template <int ROWS, int VECTORS>
inline void multiply_block(const Product& p, int64_t i, int64_t j) {
  const int64_t k_begin = p.triangle == Triangle::upper_a ? i : 0;
  const int64_t k_end = p.triangle == Triangle::lower_a ? std::min(p.K, i + ROWS) : p.K;
  const int64_t a_row = p.a_row, a_col = p.a_col, ldb = p.ldb, ldc = p.ldc;
  const float* a = p.a + i * a_row + k_begin * a_col;
  const float* b = p.b + k_begin * ldb + j;
  float* const c = p.c + i * ldc + j;

  Vector sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = p.add ? load(c + r * ldc + v * kLanes) : Vector{};
  for (int64_t k = k_begin; k < k_end; ++k, a += a_col, b += ldb) {
    Vector row[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) row[v] = load(b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const float x = a[r * a_row];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sum[r][v] += x * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) store(c + r * ldc + v * kLanes, sum[r][v]);
}

/// All rows of VECTORS vectors of C, beginning at column j. A triangular C begins with the first block of
/// rows that reaches column j, and first leaves out the second vector.
template <int VECTORS>
inline void multiply_columns(const Product& p, int64_t j) {
  int64_t i = p.triangle == Triangle::lower_c ? j / kRows * kRows : 0;
  if (VECTORS == 2 && p.triangle == Triangle::lower_c)
    for (; i + kRows <= std::min(p.M, j + kLanes); i += kRows) multiply_block<kRows, 1>(p, i, j);
  for (; i + kRows <= p.M; i += kRows) multiply_block<kRows, VECTORS>(p, i, j);
  for (; i + 4 <= p.M; i += 4) multiply_block<4, VECTORS>(p, i, j);
  for (; i + 2 <= p.M; i += 2) multiply_block<2, VECTORS>(p, i, j);
  for (; i < p.M; ++i) multiply_block<1, VECTORS>(p, i, j);
}

inline void multiply(const Product& p) {
  int64_t j = 0;
  for (; j + kVectors * kLanes <= p.N; j += kVectors * kLanes) multiply_columns<kVectors>(p, j);
  for (; j < p.N; j += kLanes) multiply_columns<1>(p, j);
}

/// to (rows, padded(cols)) = factor * from (rows, cols), whose rows are `from_row` floats apart; zeros as
/// padding.
inline void pack(float* to, const float* from, int64_t from_row, int64_t rows, int64_t cols, float factor) {
  const int64_t to_row = padded(cols);
  for (int64_t i = 0; i < rows; ++i, to += to_row, from += from_row) {
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) store(to + j, load(from + j) * factor);
    if (j < cols) store(to + j, load_first(from + j, cols - j) * factor);
  }
}

/// The opposite: to (rows, cols) with rows `to_row` floats apart = factor * from (rows, padded(cols)).
inline void unpack(float* to, int64_t to_row, const float* from, int64_t rows, int64_t cols, float factor) {
  const int64_t from_row = padded(cols);
  for (int64_t i = 0; i < rows; ++i, to += to_row, from += from_row) {
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) store(to + j, load(from + j) * factor);
    if (j < cols) store_first(to + j, load(from + j) * factor, cols - j);
  }
}

using Lanes = std::make_integer_sequence<int, kLanes>;  // 0, 1, ..., kLanes - 1

/// a0 b0 a1 b1 ...: the first, or from `start` = kLanes / 2 the second, halves of a and b, interleaved.
template <int start, int... I>
inline Vector interleave(Vector a, Vector b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (start + I / 2 + I % 2 * kLanes)...);
}
/// Lane i becomes lane i - n, round and round.
template <int n, int... I>
inline Vector rotate(Vector v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, ((I + n) % kLanes)...);
}

/// Largest of `start` and n numbers, n a multiple of kLanes. NaNs are passed over.
inline float max(const float* x, int64_t n, float start) {
  Vector m = Vector{} + start;
  for (int64_t j = 0; j < n; j += kLanes) {
    const Vector next = load(x + j);
    m = next > m ? next : m;
  }
  const auto fold = [&](Vector other) { m = other > m ? other : m; };
  if constexpr (kLanes >= 16) fold(rotate<8>(m, Lanes()));
  if constexpr (kLanes >= 8) fold(rotate<4>(m, Lanes()));
  fold(rotate<2>(m, Lanes()));
  fold(rotate<1>(m, Lanes()));
  return m[0];
}
/// Sum of the lanes of v.
inline float sum(Vector v) {
  if constexpr (kLanes >= 16) v += rotate<8>(v, Lanes());
  if constexpr (kLanes >= 8) v += rotate<4>(v, Lanes());
  v += rotate<2>(v, Lanes());
  v += rotate<1>(v, Lanes());
  return v[0];
}
/// Sum of x_j y_j for any n.
inline float dot(const float* x, const float* y, int64_t n) {
  Vector s{};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) s += load(x + j) * load(y + j);
  if (j < n) s += load_first(x + j, n - j) * load_first(y + j, n - j);
  return sum(s);
}

/// Transposes kLanes vectors in registers. Interleaving rows i and i + kLanes / 2 into rows 2i and 2i + 1
/// moves element (row, column), read as one binary number, to the number rotated by one bit; log2(kLanes)
/// such steps exchange row and column.
inline void transpose_block(Vector (&x)[kLanes]) {
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    Vector y[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i] = interleave<0>(x[i], x[i + kLanes / 2], Lanes());
      y[2 * i + 1] = interleave<kLanes / 2>(x[i], x[i + kLanes / 2], Lanes());
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
}

/// to (padded(cols), to_row) = transpose of from (rows, cols), whose rows are `from_row` floats apart.
/// Columns of `to` up to padded(rows) and rows up to padded(cols) are filled with zeros.
inline void pack_transposed(float* to, int64_t to_row, const float* from, int64_t from_row, int64_t rows,
                            int64_t cols) {
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < cols; j += kLanes) {
      Vector x[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        const float* p = from + (i + r) * from_row + j;
        if (i + r >= rows)
          x[r] = Vector{};
        else
          x[r] = j + kLanes <= cols ? load(p) : load_first(p, cols - j);
      }
      transpose_block(x);
      for (int r = 0; r < kLanes; ++r) store(to + (j + r) * to_row + i, x[r]);
    }
}

}  // namespace tile
