#include "model/kernels/attention.cuh"

// Which family of kernels runs, the sums D of the backward pass, and the general family: float32 arithmetic
// whatever the storage, any head size. A block computes 64 rows by 64 columns of one result; heads with more
// than 64 columns are shared by several blocks, each of which computes the scores again.

namespace {
constexpr int kTile = 64;           // positions per tile, and numbers of a head that a product takes at once
constexpr int kStride = kTile + 4;  // of a tile in shared memory: rows aligned to 16 bytes, shifted by a bank
constexpr int kThreads = 256;       // 16 x 16, each with 4 x 4 numbers of the block's tile
constexpr size_t kShared = sizeof(float) * 2 * kTile * kStride;

// ------------------------------------------------------------------------------------------- lse and D

/// Fills the statistics of attention.cuh. A group of `lanes` threads, a power of two, has a query; N numbers
/// at a time.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    attention_stats_kernel(float* stats, const T* dout, const T* out, const float* lse, AttentionSizes z,
                           int lanes) {
  const int64_t group = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes, padded = z.padded();
  const bool exists = group < int64_t{z.heads} * padded;
  const int head = exists ? static_cast<int>(group / padded) : 0, t = static_cast<int>(group % padded);
  const bool valid = exists && t < z.T;
  float sum = 0;
  if (valid) {
    const int64_t row = z.out_offset(head) + int64_t{t} * z.C;
    for (int d = lane * N; d < z.HS; d += lanes * N) {
      const Pack<T, N> a = load<T, N>(dout + row + d), b = load<T, N>(out + row + d);
#pragma unroll
      for (int i = 0; i < N; ++i) sum += to_float(a.v[i]) * to_float(b.v[i]);
    }
  }
  for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
  if (!exists || lane != 0) return;
  float* const to = stats + z.stats_offset(head) + t;
  to[0] = valid ? lse[int64_t{head} * z.T + t] * kLog2E : 0;
  to[padded] = sum;
}

template <typename T, int N>
void launch_stats(Context& ctx, const AttentionBackward& a, const AttentionSizes& z, float* stats) {
  int lanes = 1;
  while (lanes < kWarpSize && lanes * N < z.HS) lanes *= 2;
  launch(ctx, {.grid = blocks_for(int64_t{z.heads} * z.padded() * lanes, kThreads), .block = kThreads},
         attention_stats_kernel<T, N>, stats, data_of<T>(a.dout), data_of<T>(a.out), data_of<float>(a.lse), z,
         lanes);
}

// ------------------------------------------------------------------------------------- building blocks

/// This thread's numbers of a tile: rows row().. and columns column()..
__device__ __forceinline__ int row() {
  return static_cast<int>(threadIdx.x / 16) * 4;
}
__device__ __forceinline__ int column() {
  return static_cast<int>(threadIdx.x % 16) * 4;
}

template <typename Body>
__device__ __forceinline__ void for_each(float (&x)[4][4], Body&& body) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) body(x[i][j], row() + i, column() + j);
}

/// A matrix in memory of which blocks see 64 x 64 pieces: T rows, HS columns, rows `stride` apart.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  int T_, HS;

  /// The piece at (first_row, first_column), with zeros beyond the matrix; transposed if asked for.
  template <bool kTransposed>
  __device__ __forceinline__ void read(float* tile, int first_row, int first_column) const {
    for (int i = static_cast<int>(threadIdx.x); i < kTile * kTile; i += kThreads) {
      const int r = i / kTile, c = i % kTile;
      const bool valid = first_row + r < T_ && first_column + c < HS;
      const float x = valid ? to_float(data[(first_row + r) * stride + first_column + c]) : 0.0f;
      tile[kTransposed ? c * kStride + r : r * kStride + c] = x;
    }
  }
  __device__ __forceinline__ void write(float (&x)[4][4], int first_row, int first_column) const {
    for_each(x, [&](float value, int r, int c) {
      if (first_row + r < T_ && first_column + c < HS)
        data[(first_row + r) * stride + first_column + c] = from_float<std::remove_const_t<T>>(value);
    });
  }
};

/// sum_rc += sum over k < depth of a[k][r] b[k][c]
__device__ __forceinline__ void accumulate(float (&sum)[4][4], const float* a, const float* b, int depth) {
#pragma unroll 4
  for (int k = 0; k < depth; ++k) {
    const auto left = load<float, 4>(a + k * kStride + row()),
               right = load<float, 4>(b + k * kStride + column());
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] += left.v[i] * right.v[j];
  }
}

/// s = rows of `left` times rows of `right`: s_rc = sum over the head of left_rd right_cd.
template <typename T>
__device__ __forceinline__ void multiply(float (&s)[4][4], float* shared, const Rows<const T>& left,
                                         int left_first, const Rows<const T>& right, int right_first) {
  for_each(s, [](float& x, int, int) { x = 0; });
  for (int d = 0; d < left.HS; d += kTile) {
    __syncthreads();  // nobody reads the tiles any more
    left.template read<true>(shared, left_first, d);
    right.template read<true>(shared + kTile * kStride, right_first, d);
    __syncthreads();
    accumulate(s, shared, shared + kTile * kStride, min(kTile, left.HS - d));
  }
}

/// sum += p times 64 rows of `right`, columns from first_column on.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sum)[4][4], float* shared, float (&p)[4][4],
                                             const Rows<const T>& right, int right_first, int first_column) {
  __syncthreads();
  for_each(p, [&](float x, int r, int c) { shared[c * kStride + r] = x; });
  right.template read<false>(shared + kTile * kStride, right_first, first_column);
  __syncthreads();
  accumulate(sum, shared, shared + kTile * kStride, kTile);
}

/// What a block of a grid over (heads, tiles, groups of columns) works on, the largest number first.
struct Job {
  int head, tile, first_column;
  __device__ __forceinline__ Job(const AttentionSizes& z, int first_tile, bool late_tiles_first) {
    const int groups = (z.HS + kTile - 1) / kTile, tiles = z.tiles(kTile) - first_tile;
    const int block = static_cast<int>(blockIdx.x), i = block / groups % tiles;
    head = block / groups / tiles;
    tile = first_tile + (late_tiles_first ? tiles - 1 - i : i);
    first_column = block % groups * kTile;
  }
};
Launch launch_jobs(const AttentionSizes& z, int first_tile) {
  const int groups = (z.HS + kTile - 1) / kTile;
  return {.grid = static_cast<unsigned>(int64_t{z.heads} * groups * (z.tiles(kTile) - first_tile)),
          .block = kThreads,
          .shared = kShared};
}

/// The matrices of a head.
template <typename T>
struct Head {
  const AttentionSizes& z;
  int head;
  /// Part 0, 1, 2 of a (B, T, 3C) tensor: q, k, v.
  template <typename U>
  __device__ __forceinline__ Rows<U> part(U* qkv, int part) const {
    return {qkv + z.qkv_offset(head, part), 3 * int64_t{z.C}, z.T, z.HS};
  }
  template <typename U>
  __device__ __forceinline__ Rows<U> out(U* out) const {
    return {out + z.out_offset(head), z.C, z.T, z.HS};
  }
};

// --------------------------------------------------------------------------------------------- forward

/// Over the 16 threads that share rows of a tile.
__device__ __forceinline__ float row_max(float x) {
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, offset));
  return x;
}
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    attention_forward_kernel(T* out, float* lse, float* largest, const T* qkv, AttentionSizes z,
                             int first_tile) {
  DYN_SHARED(float, shared);
  const Job job(z, first_tile, true);
  const Head<T> head{z, job.head};
  const Rows<const T> q = head.part(qkv, 0), k = head.part(qkv, 1), v = head.part(qkv, 2);
  const int first_query = job.tile * kTile;
  float sum[4][4] = {}, max[4], total[4] = {};
  for (float& x : max) x = -INFINITY;
  for (int j = 0; j <= job.tile; ++j) {
    float s[4][4];
    multiply(s, shared, q, first_query, k, j * kTile);
    for_each(s, [&](float& score, int r, int c) {
      score = j * kTile + c > first_query + r ? -INFINITY : score * z.scale;
    });
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float old = max[i];
      max[i] = fmaxf(old, row_max(fmaxf(fmaxf(s[i][0], s[i][1]), fmaxf(s[i][2], s[i][3]))));
      const float shrink = expf(old - max[i]);
      total[i] *= shrink;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        sum[i][c] *= shrink;
        s[i][c] = expf(s[i][c] - max[i]);
        total[i] += s[i][c];
      }
    }
    multiply_add(sum, shared, s, v, j * kTile, job.first_column);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float all = row_sum(total[i]);
    const int t = first_query + row() + i;
    if (job.first_column == 0 && column() == 0 && t < z.T) {
      const int64_t at = int64_t{job.head} * z.T + t;
      lse[at] = max[i] + logf(all);
      if (largest != nullptr) largest[at] = with_nan(max[i], all);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[i][c] /= all;
  }
  head.out(out).write(sum, first_query, job.first_column);
}

// -------------------------------------------------------------------------------------------- backward

/// What a head's queries need, zeros beyond the last one.
struct Stats {
  const float* row;
  int T, padded;
  __device__ __forceinline__ Stats(const float* stats, const AttentionSizes& z, int head)
      : row(stats + z.stats_offset(head)), T(z.T), padded(z.padded()) {}
  /// In powers of two.
  __device__ __forceinline__ float lse(int t) const { return t < T ? row[t] : 0; }
  __device__ __forceinline__ float D(int t) const { return t < T ? row[padded + t] : 0; }
};

/// Keys are the rows of a block: P and dS appear transposed.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    attention_dkv_kernel(T* dqkv, const T* dout, const T* qkv, const float* stats, AttentionSizes z) {
  DYN_SHARED(float, shared);
  const Job job(z, 0, false);
  const Head<T> head{z, job.head};
  const Rows<const T> q = head.part(qkv, 0), k = head.part(qkv, 1), v = head.part(qkv, 2);
  const Rows<const T> g = head.out(dout);
  const Stats of(stats, z, job.head);
  const int first_key = job.tile * kTile;
  float dk[4][4] = {}, dv[4][4] = {};
  for (int i = job.tile; i < z.tiles(kTile); ++i) {
    const int first_query = i * kTile;
    float p[4][4], ds[4][4];
    multiply(p, shared, k, first_key, q, first_query);
    for_each(p, [&](float& x, int r, int c) {
      const bool later = first_key + r > first_query + c;
      x = later ? 0.0f : exp2f(x * z.scale2 - of.lse(first_query + c));
    });
    multiply_add(dv, shared, p, g, first_query, job.first_column);
    multiply(ds, shared, v, first_key, g, first_query);
    for_each(ds, [&](float& x, int, int c) { x -= of.D(first_query + c); });
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) ds[r][c] *= p[r][c] * z.scale;
    multiply_add(dk, shared, ds, q, first_query, job.first_column);
  }
  head.part(dqkv, 1).write(dk, first_key, job.first_column);
  head.part(dqkv, 2).write(dv, first_key, job.first_column);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    attention_dq_kernel(T* dqkv, const T* dout, const T* qkv, const float* stats, AttentionSizes z) {
  DYN_SHARED(float, shared);
  const Job job(z, 0, true);
  const Head<T> head{z, job.head};
  const Rows<const T> q = head.part(qkv, 0), k = head.part(qkv, 1), v = head.part(qkv, 2);
  const Rows<const T> g = head.out(dout);
  const Stats of(stats, z, job.head);
  const int first_query = job.tile * kTile;
  float dq[4][4] = {};
  for (int j = 0; j <= job.tile; ++j) {
    const int first_key = j * kTile;
    float p[4][4], ds[4][4];
    multiply(p, shared, q, first_query, k, first_key);
    for_each(p, [&](float& x, int r, int c) {
      const bool later = first_key + c > first_query + r;
      x = later ? 0.0f : exp2f(x * z.scale2 - of.lse(first_query + r));
    });
    multiply(ds, shared, g, first_query, v, first_key);
    for_each(ds, [&](float& x, int r, int) { x -= of.D(first_query + r); });
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) ds[r][c] *= p[r][c] * z.scale;
    multiply_add(dq, shared, ds, k, first_key, job.first_column);
  }
  head.part(dqkv, 0).write(dq, first_query, job.first_column);
}

template <typename... Tensors>
bool aligned(const Tensors&... tensors) {
  return ((reinterpret_cast<uintptr_t>(tensors.data) % 16 == 0) && ...);
}
}  // namespace

int64_t gpu::attention_scratch_bytes(int64_t B, int64_t T, int64_t NH) {
  // Sequences of one token take most: a whole aligned place for each.
  return B * T * NH * 2 * AttentionSizes::kPad * static_cast<int64_t>(sizeof(float));
}

void gpu::attention_forward(Context& ctx, const AttentionForward& a) {
  const AttentionSizes z(a.out, a.NH);
  const auto first_tile = static_cast<int>(a.first / kTile);
  if (a.first >= z.T) return;
  if (a.qkv.dtype == DType::bf16 && attention_mma::takes(z) && aligned(a.out, a.qkv))
    return attention_mma::forward(ctx, a, z);
  for_float_type(a.qkv.dtype, [&]<typename T>(T) {
    launch(ctx, launch_jobs(z, first_tile), attention_forward_kernel<T>, data_of<T>(a.out),
           data_of<float>(a.lse), data_of<float>(a.row_max), data_of<T>(a.qkv), z, first_tile);
  });
}

void gpu::attention_backward(Context& ctx, const AttentionBackward& a) {
  const AttentionSizes z(a.out, a.NH);
  Scratch::Frame frame(ctx.scratch);
  float* const stats = frame.floats(z.stats_offset(z.heads));
  if (a.qkv.dtype == DType::bf16 && attention_mma::takes(z) && aligned(a.dqkv, a.dout, a.out, a.qkv))
    return attention_mma::backward(ctx, a, z, stats);
  for_float_type(a.qkv.dtype, [&]<typename T>(T) {
    const bool vectors = z.HS % kPackSize<T> == 0 && aligned(a.dout, a.out);
    vectors ? launch_stats<T, kPackSize<T>>(ctx, a, z, stats) : launch_stats<T, 1>(ctx, a, z, stats);
    T* const dqkv = data_of<T>(a.dqkv);
    const T *dout = data_of<T>(a.dout), *qkv = data_of<T>(a.qkv);
    launch(ctx, launch_jobs(z, 0), attention_dkv_kernel<T>, dqkv, dout, qkv, stats, z);
    launch(ctx, launch_jobs(z, 0), attention_dq_kernel<T>, dqkv, dout, qkv, stats, z);
  });
}
