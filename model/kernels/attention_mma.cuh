// Building blocks of attention on tensor cores: tiles of bf16 rows in shared memory, and products of them by
// mma m16n8k16 with float32 sums in registers (fragment layouts: mma.h).
//
// A tile holds rows of HS numbers without padding. The 16-byte chunk c of row r is stored in the place of
// chunk c ^ (r % 8). ldmatrix reads one chunk of eight consecutive rows at a time, which without the exchange
// would all lie in the same four banks; exchanged, the eight chunks cover all 32 banks once. Copies into and
// out of a tile move whole rows, which the exchange only permutes. Padding would do the same for 8 % more
// memory.
//
// In every kernel a warp owns 16 kM rows (of queries or of keys), and all columns of the products with them:
// no warp waits for another one's part of a product, and P and dS never leave the registers.
#pragma once

#include <cstring>

#include "model/kernels/attention.cuh"
#include "model/kernels/fast_math.h"
#include "model/kernels/mma.h"

namespace attention_mma {

__device__ __forceinline__ int lane_id() {
  return static_cast<int>(threadIdx.x % kWarpSize);
}
__device__ __forceinline__ int warp_id() {
  return static_cast<int>(threadIdx.x / kWarpSize);
}

/// Over the four lanes that share rows of a product.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kFullMask, x, 1);
  return x + __shfl_xor_sync(kFullMask, x, 2);
}

/// A lane's place in a tile, as an offset into it: all that depends on the lane is worked out once, into one
/// number, and the rest is known to the compiler.
template <int HS>
struct Place {
  int start;  // a row's first number is a multiple of 64, so the bits of its chunks are 3 to 5

  /// chunk < 8
  __device__ __forceinline__ Place(int row, int chunk) : start(row * HS | (chunk ^ (row & 7)) * 8) {}
  /// So many rows and chunks further on: rows a multiple of 8; chunks even, or the lane's chunk is 0.
  __device__ __forceinline__ int at(int rows, int chunks) const {
    return (start ^ (chunks & 7) * 8) + rows * HS + (chunks >> 3) * 64;
  }
};

/// What this lane names in an ldmatrix_x4: its row of a (16, 16) piece, whose four matrices are the first and
/// the second eight rows of the left half, then of the right half. So tensor cores take a left factor, and a
/// right one through ldmatrix_x4_trans.
template <int HS>
__device__ __forceinline__ Place<HS> matrix_place() {
  return {lane_id() % 16, lane_id() / 16};
}
/// The same for a right factor whose columns are the rows of the tile: the left and the right half of the
/// first eight rows, then of the second. A product takes two halves, and they must be neighbours in
/// registers: in the other order, every second instruction here would be a move.
template <int HS>
__device__ __forceinline__ Place<HS> column_place() {
  return {lane_id() / 16 * 8 + lane_id() % 8, lane_id() / 8 % 2};
}

/// Copies rows of a matrix in memory into tiles of kRows rows, one tile after the other, with all threads of
/// the block; zeros from row T on.
template <int HS, int kRows, int kThreads>
class RowCopy {
 public:
  __device__ __forceinline__ RowCopy(const bf16* matrix, int stride, int first, int T)
      : stride_(stride),
        T_(T),
        source_(matrix + int64_t{first + row()} * stride + threadIdx.x % kChunks * 8) {}
  /// Starts the next tile, which begins with row `first` of this matrix, or of one that lies `further` on.
  __device__ __forceinline__ void start(bf16* tile, int first, int further = 0) const {
    const int chunk = static_cast<int>(threadIdx.x % kChunks);
    bf16* const target = tile + Place<HS>(row(), chunk % 8).at(0, chunk & 8);
#pragma unroll
    for (int i = 0; i < kRows; i += kStep)
      cp_async16(target + i * HS, source_ + i * stride_ + further, first + row() + i < T_);
  }
  __device__ __forceinline__ void advance() {
    source_ += kRows * stride_;
  }

 private:
  static constexpr int kChunks = HS / 8, kStep = kThreads / kChunks;  // rows that the block copies at once
  static_assert(kStep % 8 == 0 && kRows % kStep == 0);
  static __device__ __forceinline__ int row() {
    return static_cast<int>(threadIdx.x / kChunks);
  }
  int stride_, T_;
  const bf16* source_;  // this thread's chunk of the next tile's first rows
};

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

/// The warp's own rows of a tile as the left factor of products: the first kKept pieces of 16 columns are
/// held in registers, the others read again each time.
template <int HS, int kM, int kKept>
struct OwnRows {
  const bf16* rows;
  uint32_t kept[kKept > 0 ? kKept : 1][kM][4];

  /// `first` is a multiple of 8.
  __device__ __forceinline__ OwnRows(const bf16* tile, int first) : rows(tile + first * HS) {}
  __device__ __forceinline__ void read(uint32_t (&a)[4], int k, int m) const {
    ldmatrix_x4(a, rows + matrix_place<HS>().at(m * 16, k * 2));
  }
  /// To be called once, when the tile is there.
  __device__ __forceinline__ void keep() {
#pragma unroll
    for (int k = 0; k < kKept; ++k)
#pragma unroll
      for (int m = 0; m < kM; ++m) read(kept[k][m], k, m);
  }
  __device__ __forceinline__ void get(uint32_t (&a)[kM][4], int k) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if (k >= kKept) {
        read(a[m], k, m);
        continue;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m][i] = kept[k][m][i];
    }
  }
};

/// s += own rows (16 kM, HS) times the transpose of a tile of 8 kN rows.
template <int HS, int kM, int kN, int kKept>
__device__ __forceinline__ void multiply_add_transposed(float (&s)[kM][kN][4],
                                                        const OwnRows<HS, kM, kKept>& own, const bf16* tile) {
#pragma unroll
  for (int k = 0; k < HS / 16; ++k) {
    uint32_t a[kM][4];
    own.get(a, k);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, tile + column_place<HS>().at(n * 8, k * 2));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_bf16(s[m][n], a[m], b[0], b[1]);
        mma_bf16(s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

/// sum += p (16 kM, 8 kN), rounded to bf16, times a tile of 8 kN rows. The accumulators of one product are
/// laid out as the left factor of the next one.
template <int HS, int kM, int kN>
__device__ __forceinline__ void multiply_add(float (&sum)[kM][HS / 8][4], const float (&p)[kM][kN][4],
                                             const bf16* tile) {
#pragma unroll
  for (int k = 0; k < kN; k += 2) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[m][i] = pack_bf16(p[m][k + i / 2][i % 2 * 2], p[m][k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int n = 0; n < HS / 8; n += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, tile + matrix_place<HS>().at(k * 8, n));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_bf16(sum[m][n], a[m], b[0], b[1]);
        mma_bf16(sum[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

/// Calls body(element, row, column) for each number that this lane holds of a (16 kM, 8 kN) product.
template <int kM, int kN, typename Body>
__device__ __forceinline__ void for_each(float (&s)[kM][kN][4], Body&& body) {
  const int row = lane_id() / 4, column = lane_id() % 4 * 2;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) body(s[m][n][e], m * 16 + e / 2 * 8 + row, n * 8 + e % 2 + column);
}

/// Writes the warp's sums, as bf16, to positions `first`.. before T, by way of the warp's own rows of a tile,
/// from `row` on, so that memory sees whole chunks. Nobody else may use these rows of the tile any more.
template <int HS, int kM>
__device__ __forceinline__ void store_rows(bf16* to, int stride, int first, int T, bf16* tile, int row,
                                           const float (&sum)[kM][HS / 8][4]) {
  constexpr int kChunks = HS / 8, kStep = kWarpSize / kChunks;
  const Place<HS> written(row + lane_id() / 4, 0);
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kChunks; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Pack<bf16, 2> pair{from_float<bf16>(sum[m][n][half * 2]),
                                 from_float<bf16>(sum[m][n][half * 2 + 1])};
        store(tile + written.at(m * 16 + half * 8, n) + lane_id() % 4 * 2, pair);
      }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kM * 16; i += kStep) {
    const int r = i + lane_id() / kChunks, chunk = lane_id() % kChunks;
    if (first + r < T)
      store_global16(to + int64_t{first + r} * stride + chunk * 8,
                     *reinterpret_cast<const int4*>(tile + Place<HS>(row + r, chunk % 8).at(0, chunk & 8)));
  }
}

}  // namespace attention_mma
