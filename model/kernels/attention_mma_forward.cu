#include "model/kernels/attention_mma.cuh"

// The forward pass on tensor cores, after FlashAttention-2 (arXiv 2307.08691), section 3.1: a block has 128
// queries and walks over the keys, 64 or 32 at a time; the next keys and values are on their way while the
// present ones are used. A warp has 32 queries, so that each piece of a key tile that it reads from shared
// memory serves two products.

namespace attention_mma {
namespace {

template <int HS>
struct Forward {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int kM = 2, kN = HS == 64 ? 8 : 4;  // a warp's scores: (16 kM, 8 kN)
  static constexpr int kQueries = 16 * kM * kWarps, kKeys = 8 * kN;
  static constexpr int kKept = HS == 64 ? 4 : 0;  // of queries; with HS = 128 sums take half of the registers
  static constexpr int kBlocks = 2;               // per multiprocessor: up to 255 registers per thread
  static constexpr int kTile = kKeys * HS;
  static constexpr size_t kShared = sizeof(bf16) * (kQueries * HS + 4 * kTile);
};

/// Online softmax of the rows that this lane shares with the three others of its quad. In powers of two:
/// exp(scale s) = 2^(c s), with c = scale log2(e).
template <int kM>
struct Softmax {
  float max[kM][2];  // largest c s so far
  float sum[kM][2];  // this lane's share of sum_j 2^(c s_j - max)

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) max[m][half] = -INFINITY, sum[m][half] = 0;
  }

  static __device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kFullMask, x, 1));
    return fmaxf(x, __shfl_xor_sync(kFullMask, x, 2));
  }

  /// Scores become 2^(c s - max); what was summed under the old maximum shrinks to the new one.
  template <int kN, int kColumns>
  __device__ __forceinline__ void add(float (&s)[kM][kN][4], float (&out)[kM][kColumns][4], float c) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = -INFINITY;
#pragma unroll
        for (int n = 0; n < kN; ++n) top = fmaxf(top, fmaxf(s[m][n][half * 2], s[m][n][half * 2 + 1]));
        const float old = max[m][half], now = fmaxf(old, quad_max(top) * c);
        const float shrink = fast_exp2(old - now);
        float total = sum[m][half] * shrink;
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int e = half * 2; e < half * 2 + 2; ++e) {
            s[m][n][e] = fast_exp2(fmaf(s[m][n][e], c, -now));
            total += s[m][n][e];
          }
        max[m][half] = now;
        sum[m][half] = total;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          out[m][n][half * 2] *= shrink;
          out[m][n][half * 2 + 1] *= shrink;
        }
      }
  }

  /// Divides by the sums, and writes lse and, unless null, the largest scores of the warp's rows, which begin
  /// at position `first`.
  template <int kColumns>
  __device__ __forceinline__ void finish(float (&out)[kM][kColumns][4], float* lse, float* largest, int first,
                                         int T) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = quad_sum(sum[m][half]), share = 1.0f / total;
        const int t = first + m * 16 + half * 8 + lane_id() / 4;
        if (lane_id() % 4 == 0 && t < T) {
          lse[t] = (max[m][half] + log2f(total)) * kLn2;
          if (largest != nullptr) largest[t] = with_nan(max[m][half], total) * kLn2;
        }
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          out[m][n][half * 2] *= share;
          out[m][n][half * 2 + 1] *= share;
        }
      }
  }
};

template <int HS>
__global__ void __launch_bounds__(Forward<HS>::kThreads, Forward<HS>::kBlocks)
    attention_forward_mma(bf16* out, float* lse, float* largest, const bf16* qkv, AttentionSizes z,
                          int first_tile) {
  using F = Forward<HS>;
  DYN_SHARED(bf16, queries);
  bf16* const keys = queries + F::kQueries * HS;  // two stages of keys, then two of values
  bf16* const values = keys + 2 * F::kTile;

  // The tiles of a head follow each other, so that its keys stay in the cache; those with most keys begin.
  const int tiles = z.tiles(F::kQueries), per_head = tiles - first_tile;
  const int head = static_cast<int>(blockIdx.x) / per_head;
  const int first_query = (tiles - 1 - static_cast<int>(blockIdx.x) % per_head) * F::kQueries;
  const int last_tile = (min(first_query + F::kQueries, z.T) - 1) / F::kKeys;
  const bf16* const from = qkv + z.qkv_offset(head, 0);
  RowCopy<HS, F::kKeys, F::kThreads> copy(from + z.C, 3 * z.C, 0, z.T);
  const auto copy_next = [&](int j) {
    copy.start(keys + j % 2 * F::kTile, j * F::kKeys);
    copy.start(values + j % 2 * F::kTile, j * F::kKeys, z.C);
    copy.advance();
    cp_async_commit();
  };
  RowCopy<HS, F::kQueries, F::kThreads>(from, 3 * z.C, first_query, z.T).start(queries, first_query);
  copy_next(0);

  const int own = warp_id() * 16 * F::kM, warp_first = first_query + own,
            warp_last = warp_first + 16 * F::kM - 1;
  OwnRows<HS, F::kM, F::kKept> q(queries, own);
  cp_async_wait<0>();
  __syncthreads();
  q.keep();
  Softmax<F::kM> softmax;
  float sum[F::kM][HS / 8][4] = {};
  for (int j = 0; j <= last_tile; ++j) {
    cp_async_wait<0>();
    __syncthreads();  // tile j is there, and nobody reads tile j - 1 any more
    if (j < last_tile) copy_next(j + 1);
    const int first_key = j * F::kKeys;
    if (first_key > warp_last) continue;  // all of these keys are later than this warp's queries
    float s[F::kM][F::kN][4] = {};
    multiply_add_transposed(s, q, keys + j % 2 * F::kTile);
    if (first_key + F::kKeys - 1 > warp_first)
      for_each(s, [&](float& score, int row, int column) {
        if (first_key + column > warp_first + row) score = -INFINITY;
      });
    softmax.add(s, sum, z.scale2);
    multiply_add<HS>(sum, s, values + j % 2 * F::kTile);
  }
  const int64_t rows_of_head = int64_t{head} * z.T;
  softmax.finish(sum, lse + rows_of_head, largest == nullptr ? nullptr : largest + rows_of_head, warp_first,
                 z.T);
  store_rows<HS>(out + z.out_offset(head), z.C, warp_first, z.T, queries, own, sum);
}

template <int HS>
void launch_forward(Context& ctx, const AttentionForward& a, const AttentionSizes& z) {
  using F = Forward<HS>;
  const int first_tile = static_cast<int>(a.first / F::kQueries), tiles = z.tiles(F::kQueries);
  if (first_tile >= tiles) return;
  launch(ctx,
         {.grid = static_cast<unsigned>(int64_t{z.heads} * (tiles - first_tile)),
          .block = F::kThreads,
          .shared = F::kShared},
         attention_forward_mma<HS>, data_of<bf16>(a.out), data_of<float>(a.lse), data_of<float>(a.row_max),
         data_of<bf16>(a.qkv), z, first_tile);
}
}  // namespace

void forward(Context& ctx, const AttentionForward& a, const AttentionSizes& z) {
  z.HS == 64 ? launch_forward<64>(ctx, a, z) : launch_forward<128>(ctx, a, z);
}
}  // namespace attention_mma
