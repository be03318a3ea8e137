#include "model/kernels/attention_mma.cuh"
#include "model/kernels/hopper.h"

// The backward pass on tensor cores, after FlashAttention-2 (arXiv 2307.08691), section 3.2, in two kernels
// without atomics: one walks over the keys of its queries and sums dq, the other over the queries of its keys
// and sums dk and dv. S and dP are computed twice, seven products instead of five, but sums stay in
// registers and their order is fixed. The next tiles are on their way while the present ones are used. The
// first one, which has rows of dout in shared memory anyway, fills the statistics that both need.

namespace attention_mma {
namespace {

/// P from the scores of a tile, or of its transpose: 2^(c s - lse), both in powers of two.
__device__ __forceinline__ float probability(float score, float c, float lse) {
  return fast_exp2(fmaf(score, c, -lse));
}

/// x *= y, number by number.
template <int kM, int kN>
__device__ __forceinline__ void scale_by(float (&x)[kM][kN][4], const float (&y)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[m][n][e] *= y[m][n][e];
}

// ----------------------------------------------------------------------------------------------- dk and dv

/// Keys are the rows of a warp, so P and dS appear transposed, as the products with dout and q need them.
template <int HS>
struct KeyGradient {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int kM = HS == 64 ? 2 : 1, kN = 4;  // (16 kM keys, 8 kN queries) per warp
  static constexpr int kKeys = 16 * kM * kWarps, kQueries = 8 * kN;
  // Pieces of 16 columns of a warp's keys in registers: as many as go without spills.
  static constexpr int kKept = HS == 128 ? 8 : HOPPER_CODE ? 3 : 0;
  static constexpr int kBlocks = 2;  // per multiprocessor: up to 255 registers per thread
  static constexpr int kTile = kQueries * HS;
  struct Stages {
    bf16 queries[2][kTile], dout[2][kTile];
    float lse[2][kQueries], D[2][kQueries];
  };
  static constexpr size_t kShared = 2 * kKeys * HS * sizeof(bf16) + sizeof(Stages);
};

template <int HS>
__global__ void __launch_bounds__(KeyGradient<HS>::kThreads, KeyGradient<HS>::kBlocks)
    attention_dkv_mma(bf16* dqkv, const bf16* dout, const bf16* qkv, const float* stats, AttentionSizes z) {
  using G = KeyGradient<HS>;
  DYN_SHARED(bf16, keys);
  bf16* const values = keys + G::kKeys * HS;
  auto& stages = *reinterpret_cast<typename G::Stages*>(values + G::kKeys * HS);

  // The tiles of a head follow each other, so that its queries stay in the cache; the earliest keys, which
  // most queries see, begin.
  const int per_head = z.tiles(G::kKeys), head = static_cast<int>(blockIdx.x) / per_head;
  const int first_key = static_cast<int>(blockIdx.x) % per_head * G::kKeys;
  const int first_tile = first_key / G::kQueries, tiles = z.tiles(G::kQueries);
  const bf16* const from = qkv + z.qkv_offset(head, 0);
  RowCopy<HS, G::kQueries, G::kThreads> copy_queries(from, 3 * z.C, first_key, z.T);
  RowCopy<HS, G::kQueries, G::kThreads> copy_dout(dout + z.out_offset(head), z.C, first_key, z.T);
  const float* const lse = stats + z.stats_offset(head);
  const auto copy_next = [&](int i) {
    copy_queries.start(stages.queries[i % 2], i * G::kQueries);
    copy_queries.advance();
    copy_dout.start(stages.dout[i % 2], i * G::kQueries);
    copy_dout.advance();
    if (const int at = static_cast<int>(threadIdx.x) * 4; at < G::kQueries) {
      const int t = i * G::kQueries + at;
      cp_async16(stages.lse[i % 2] + at, lse + t, t < z.T);
      cp_async16(stages.D[i % 2] + at, lse + z.padded() + t, t < z.T);
    }
    cp_async_commit();
  };
  RowCopy<HS, G::kKeys, G::kThreads> copy_own(from + z.C, 3 * z.C, first_key, z.T);
  copy_own.start(keys, first_key);
  copy_own.start(values, first_key, z.C);
  copy_next(first_tile);

  const int own = warp_id() * 16 * G::kM, warp_first = first_key + own,
            warp_last = warp_first + 16 * G::kM - 1;
  OwnRows<HS, G::kM, G::kKept> k(keys, own);
  const OwnRows<HS, G::kM, 0> v(values, own);
  cp_async_wait<0>();
  __syncthreads();
  k.keep();
  float dk[G::kM][HS / 8][4] = {}, dv[G::kM][HS / 8][4] = {};
  for (int i = first_tile; i < tiles; ++i) {
    cp_async_wait<0>();
    __syncthreads();  // tile i is there, and nobody reads tile i - 1 any more
    if (i + 1 < tiles) copy_next(i + 1);
    const bf16 *const queries = stages.queries[i % 2], *const douts = stages.dout[i % 2];
    const int first_query = i * G::kQueries;
    if (first_query + G::kQueries - 1 < warp_first) continue;  // all before this warp's keys
    float p[G::kM][G::kN][4] = {}, ds[G::kM][G::kN][4];
    multiply_add_transposed(p, k, queries);
    if (first_query < warp_last)
      for_each(p, [&](float& score, int row, int column) {
        if (warp_first + row > first_query + column) score = -INFINITY;
      });
    for_each(p, [&](float& score, int, int column) {
      score = probability(score, z.scale2, stages.lse[i % 2][column]);
    });
    multiply_add<HS>(dv, p, douts);
    for_each(ds, [&](float& x, int, int column) { x = -stages.D[i % 2][column]; });
    multiply_add_transposed(ds, v, douts);  // dP - D
    scale_by(ds, p);
    multiply_add<HS>(dk, ds, queries);
  }
  for_each(dk, [&](float& x, int, int) { x *= z.scale; });
  bf16* const to = dqkv + z.qkv_offset(head, 0);
  store_rows<HS>(to + z.C, 3 * z.C, warp_first, z.T, keys, own, dk);
  store_rows<HS>(to + 2 * z.C, 3 * z.C, warp_first, z.T, values, own, dv);
}

// ---------------------------------------------------------------------------------------------------- dq

template <int HS>
struct QueryGradient {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int kM = HS == 64 ? 2 : 1, kN = 4;  // (16 kM queries, 8 kN keys) per warp
  static constexpr int kQueries = 16 * kM * kWarps, kKeys = 8 * kN;
  static constexpr int kBlocks = 2;
  static constexpr int kTile = kKeys * HS;
  static constexpr size_t kShared = sizeof(bf16) * (2 * kQueries * HS + 4 * kTile);
};

/// lse and D of the rows that this lane shares with the three others of its quad, each of which has a quarter
/// of the numbers of out.
template <int HS>
struct RowStats {
  static constexpr int kM = QueryGradient<HS>::kM, kChunks = HS / 8 / 4;
  float lse[kM][2], D[kM][2];  // lse in powers of two
  Pack<bf16, 8> out[kM][2][kChunks];

  static __device__ __forceinline__ int row(int m, int half) { return m * 16 + half * 8 + lane_id() / 4; }

  /// Of a head, for the warp's rows from position `first` on; zeros from T on.
  __device__ __forceinline__ void load_rows(const bf16* outs, const float* log_sums, int first,
                                            const AttentionSizes& z) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = first + row(m, half);
        const bf16* const from = outs + int64_t{t} * z.C + lane_id() % 4 * kChunks * 8;
        lse[m][half] = t < z.T ? log_sums[t] * kLog2E : 0;
#pragma unroll
        for (int i = 0; i < kChunks; ++i)
          out[m][half][i] = t < z.T ? load<bf16, 8>(from + i * 8) : Pack<bf16, 8>{};
      }
  }
  /// D, from the rows of a tile that begin with row `own`.
  __device__ __forceinline__ void multiply(const bf16* tile, int own) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
          const int chunk = lane_id() % 4 * kChunks + i;
          const auto dout = load<bf16, 8>(tile + Place<HS>(own + row(m, half), chunk % 8).at(0, chunk & 8));
#pragma unroll
          for (int k = 0; k < 8; ++k) sum += to_float(dout.v[k]) * to_float(out[m][half][i].v[k]);
        }
        D[m][half] = quad_sum(sum);
      }
  }
  /// For the kernel that comes next.
  __device__ __forceinline__ void store_to(float* stats, int first, const AttentionSizes& z) const {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = first + row(m, half);
        if (lane_id() % 4 != 0 || t >= z.padded()) continue;
        stats[t] = lse[m][half];
        stats[z.padded() + t] = D[m][half];
      }
  }
};

template <int HS>
__global__ void __launch_bounds__(QueryGradient<HS>::kThreads, QueryGradient<HS>::kBlocks)
    attention_dq_mma(bf16* dqkv, float* stats, const bf16* dout, const bf16* out, const float* log_sums,
                     const bf16* qkv, AttentionSizes z) {
  using G = QueryGradient<HS>;
  DYN_SHARED(bf16, queries);
  bf16* const douts = queries + G::kQueries * HS;
  bf16* const keys = douts + G::kQueries * HS;  // two stages of keys, then two of values
  bf16* const values = keys + 2 * G::kTile;

  const int per_head = z.tiles(G::kQueries), head = static_cast<int>(blockIdx.x) / per_head;
  const int first_query = (per_head - 1 - static_cast<int>(blockIdx.x) % per_head) * G::kQueries;
  const int last_tile = (min(first_query + G::kQueries, z.T) - 1) / G::kKeys;
  const bf16* const from = qkv + z.qkv_offset(head, 0);
  RowCopy<HS, G::kKeys, G::kThreads> copy(from + z.C, 3 * z.C, 0, z.T);
  const auto copy_next = [&](int j) {
    copy.start(keys + j % 2 * G::kTile, j * G::kKeys);
    copy.start(values + j % 2 * G::kTile, j * G::kKeys, z.C);
    copy.advance();
    cp_async_commit();
  };
  RowCopy<HS, G::kQueries, G::kThreads>(from, 3 * z.C, first_query, z.T).start(queries, first_query);
  RowCopy<HS, G::kQueries, G::kThreads>(dout + z.out_offset(head), z.C, first_query, z.T)
      .start(douts, first_query);
  copy_next(0);

  const int own = warp_id() * 16 * G::kM, warp_first = first_query + own,
            warp_last = warp_first + 16 * G::kM - 1;
  RowStats<HS> of;
  of.load_rows(out + z.out_offset(head), log_sums + int64_t{head} * z.T, warp_first, z);
  cp_async_wait<0>();
  __syncthreads();
  of.multiply(douts, own);
  of.store_to(stats + z.stats_offset(head), warp_first, z);
  OwnRows<HS, G::kM, HS / 16> q(queries, own), g(douts, own);
  q.keep();
  g.keep();
  float dq[G::kM][HS / 8][4] = {};
  for (int j = 0; j <= last_tile; ++j) {
    cp_async_wait<0>();
    __syncthreads();  // tile j is there, and nobody reads tile j - 1 any more
    if (j < last_tile) copy_next(j + 1);
    const int first_key = j * G::kKeys, stage = j % 2 * G::kTile;
    if (first_key > warp_last) continue;  // all of these keys are later than this warp's queries
    float p[G::kM][G::kN][4] = {}, ds[G::kM][G::kN][4];
    multiply_add_transposed(p, q, keys + stage);
    if (first_key + G::kKeys - 1 > warp_first)
      for_each(p, [&](float& score, int row, int column) {
        if (first_key + column > warp_first + row) score = -INFINITY;
      });
#pragma unroll
    for (int m = 0; m < G::kM; ++m)
#pragma unroll
      for (int n = 0; n < G::kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          p[m][n][e] = probability(p[m][n][e], z.scale2, of.lse[m][e / 2]);
          ds[m][n][e] = -of.D[m][e / 2];
        }
    multiply_add_transposed(ds, g, values + stage);  // dP - D
    scale_by(ds, p);
    multiply_add<HS>(dq, ds, keys + stage);
  }
  for_each(dq, [&](float& x, int, int) { x *= z.scale; });
  store_rows<HS>(dqkv + z.qkv_offset(head, 0), 3 * z.C, warp_first, z.T, queries, own, dq);
}

template <int HS>
void launch_backward(Context& ctx, const AttentionBackward& a, const AttentionSizes& z, float* stats) {
  using K = KeyGradient<HS>;
  using Q = QueryGradient<HS>;
  bf16* const dqkv = data_of<bf16>(a.dqkv);
  const bf16 *dout = data_of<bf16>(a.dout), *qkv = data_of<bf16>(a.qkv);
  launch(ctx,
         {.grid = static_cast<unsigned>(int64_t{z.heads} * z.tiles(Q::kQueries)),
          .block = Q::kThreads,
          .shared = Q::kShared},
         attention_dq_mma<HS>, dqkv, stats, dout, data_of<bf16>(a.out), data_of<float>(a.lse), qkv, z);
  launch(ctx,
         {.grid = static_cast<unsigned>(int64_t{z.heads} * z.tiles(K::kKeys)),
          .block = K::kThreads,
          .shared = K::kShared},
         attention_dkv_mma<HS>, dqkv, dout, qkv, stats, z);
}
}  // namespace

void backward(Context& ctx, const AttentionBackward& a, const AttentionSizes& z, float* stats) {
  z.HS == 64 ? launch_backward<64>(ctx, a, z, stats) : launch_backward<128>(ctx, a, z, stats);
}
}  // namespace attention_mma
