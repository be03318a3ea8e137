#include "model/kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "model/kernels/simd.h"
#include "model/kernels/tile.h"

namespace {
using tile::Triangle;

// Queries, and keys, per tile. Scores of a tile are 16 KiB; all the tiles of one product fit the second-level
// cache many times over. A multiple of kRows and of kLanes, so that only the last tile of a sequence is
// ragged.
constexpr int64_t kTile = 8 * tile::kRows;
static_assert(kTile % tile::kLanes == 0 && kTile % tile::kRows == 0);
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Sizes {
  Sizes(const Tensor& out, int64_t NH)
      : B(out.shape[0]),
        T(out.shape[1]),
        C(out.shape[2]),
        NH(NH),
        HS(C / NH),
        width(tile::padded(HS)),
        tiles((T + kTile - 1) / kTile) {}
  int64_t B, T, C, NH, HS;
  int64_t width;  // HS with padding: the row length of packed tiles
  int64_t tiles;  // of queries, and of keys
  int64_t heads() const { return B * NH; }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(HS)); }
  /// Rows of tile i.
  int64_t rows(int64_t i) const { return std::min(kTile, T - i * kTile); }
  /// Where row t of head n begins in a (B, T, 3C) tensor; part is 0 for q, 1 for k, 2 for v.
  int64_t qkv_offset(int64_t n, int64_t part, int64_t t) const {
    return (n / NH * T + t) * 3 * C + part * C + n % NH * HS;
  }
  /// The same in a (B, T, C) tensor.
  int64_t out_offset(int64_t n, int64_t t) const { return (n / NH * T + t) * C + n % NH * HS; }
};

/// Tiles [first, last) of one head.
struct Segment {
  int64_t head, first, last;
};

/// The tiles of all heads, laid in one row and cut into `threads` contiguous ranges of about equal cost. So
/// one thread has whole heads where there are many, and a head is shared where there are few, or an odd
/// number. Query tile i meets i + 1 key tiles; key tile j meets tiles - j query tiles.
struct Split {
  int64_t heads, tiles;
  bool
      descending;  // costs tiles, tiles - 1, ..., 1 (by key tile) instead of 1, 2, ..., tiles (by query tile)
  int64_t threads;

  /// Where the range of thread t begins, as head * tiles + tile.
  int64_t begin(int64_t t) const {
    const int64_t head_cost = tiles * (tiles + 1) / 2;
    int64_t rest = heads * head_cost * t / threads;
    const int64_t head = rest / head_cost;
    rest -= head * head_cost;
    int64_t i = 0;
    for (int64_t cost; i < tiles && 2 * rest >= (cost = descending ? tiles - i : i + 1); ++i) rest -= cost;
    return head * tiles + i;
  }

  template <typename Body>
  void for_each_segment(int64_t t, Body&& body) const {
    const int64_t end = begin(t + 1);
    for (int64_t at = begin(t); at < end;) {
      const int64_t head = at / tiles, next = std::min(end, (head + 1) * tiles);
      body(Segment{head, at - head * tiles, next - head * tiles});
      at = next;
    }
  }
};

/// Columns of a row of scores that later products may touch: all of them or, in a tile on the diagonal, those
/// up to the end of the row's block.
int64_t touched_columns(int64_t row, int64_t keys, bool diagonal) {
  return tile::padded(diagonal ? std::min((row / tile::kRows + 1) * tile::kRows, keys) : keys);
}

// ------------------------------------------------------------------------------------------------- forward

/// One thread's memory in the forward pass: `floats` numbers from `base` on. Without a base, only counts.
struct ForwardMemory {
  explicit ForwardMemory(const Sizes& z, float* base = nullptr) {
    const auto take = [&](int64_t count) {
      floats += count;
      return base == nullptr ? nullptr : base + floats - count;
    };
    k_transposed = take(z.tiles * z.width * kTile);
    v = take(z.tiles * kTile * z.width);
    q = take(kTile * z.width);
    out = take(kTile * z.width);
    scores = take(kTile * kTile);
    max = take(kTile);
    sum = take(kTile);
  }
  float* k_transposed;  // per key tile (width, kTile)
  float* v;             // (T, width)
  float *q, *out;       // (kTile, width): scaled queries; results before the division by sum
  float* scores;        // (kTile, kTile)
  float *max, *sum;     // (kTile): running maximum, and sum of exponentials relative to it
  int64_t floats = 0;
};

/// Updates the running maximum of each row; what was summed under the old maximum shrinks to the new one.
void raise_maximum(const ForwardMemory& m, int64_t rows, int64_t keys, int64_t width, bool first,
                   bool diagonal) {
  for (int64_t r = 0; r < rows; ++r) {
    float* const s = m.scores + r * kTile;
    const int64_t n = touched_columns(r, keys, diagonal);
    if (diagonal) std::fill(s + r + 1, s + n, -kInfinity);
    const float old = first ? -kInfinity : m.max[r];
    m.max[r] = tile::max(s, n, old);
    if (first) m.sum[r] = 0;
    if (first || m.max[r] == old) continue;
    const float shrink = exp_simd(old - m.max[r]);
    m.sum[r] *= shrink;
    for (int64_t d = 0; d < width; d += tile::kLanes)
      tile::store(m.out + r * width + d, tile::load(m.out + r * width + d) * shrink);
  }
}

/// Scores become exponentials relative to the running maximum, and are added to the running sum. All rows in
/// one tight loop: the constants of exp fill most of the registers and should be loaded once.
void exponentials(const ForwardMemory& m, int64_t rows, int64_t keys, bool diagonal) {
  for (int64_t r = 0; r < rows; ++r) {
    float* const s = m.scores + r * kTile;
    const int64_t n = touched_columns(r, keys, diagonal);
    const float max = m.max[r];
    tile::Vector sum{};
    for (int64_t j = 0; j < n; j += tile::kLanes) {
#pragma omp simd
      for (int64_t lane = j; lane < j + tile::kLanes; ++lane) s[lane] = exp_simd(s[lane] - max);
      sum += tile::load(s + j);
    }
    m.sum[r] += tile::sum(sum);
  }
}

void forward_query_tile(const AttentionForward& a, const Sizes& z, const ForwardMemory& m, int64_t head,
                        int64_t i) {
  const int64_t rows = z.rows(i), t = i * kTile;
  tile::pack(m.q, a.qkv.f32() + z.qkv_offset(head, 0, t), 3 * z.C, rows, z.HS, z.scale());
  for (int64_t j = 0; j <= i; ++j) {
    const bool first = j == 0, diagonal = j == i;
    const int64_t keys = z.rows(j);
    tile::multiply({.c = m.scores,
                    .ldc = kTile,
                    .a = m.q,
                    .a_row = z.width,
                    .a_col = 1,
                    .b = m.k_transposed + j * z.width * kTile,
                    .ldb = kTile,
                    .M = rows,
                    .N = tile::padded(keys),
                    .K = z.HS,
                    .add = false,
                    .triangle = diagonal ? Triangle::lower_c : Triangle::none});
    raise_maximum(m, rows, keys, z.width, first, diagonal);
    exponentials(m, rows, keys, diagonal);
    tile::multiply({.c = m.out,
                    .ldc = z.width,
                    .a = m.scores,
                    .a_row = kTile,
                    .a_col = 1,
                    .b = m.v + j * kTile * z.width,
                    .ldb = z.width,
                    .M = rows,
                    .N = z.width,
                    .K = keys,
                    .add = !first,
                    .triangle = diagonal ? Triangle::lower_a : Triangle::none});
  }
  float* const out = a.out.f32() + z.out_offset(head, t);
  float* const lse = a.lse.f32() + head * z.T + t;
  for (int64_t r = 0; r < rows; ++r) {
    tile::unpack(out + r * z.C, 0, m.out + r * z.width, 1, z.HS, 1.0f / m.sum[r]);
    lse[r] = m.max[r] + std::log(m.sum[r]);
  }
  if (!a.row_max) return;
  float* const row_max = a.row_max.f32() + head * z.T + t;
  // The maximum passes over a NaN, the sum does not; it is finite otherwise.
  for (int64_t r = 0; r < rows; ++r) row_max[r] = m.max[r] + 0.0f * m.sum[r];
}

void forward_segment(const AttentionForward& a, const Sizes& z, const ForwardMemory& m, Segment s) {
  for (int64_t j = 0; j < s.last; ++j) {
    const float* const k = a.qkv.f32() + z.qkv_offset(s.head, 1, j * kTile);
    const float* const v = a.qkv.f32() + z.qkv_offset(s.head, 2, j * kTile);
    tile::pack_transposed(m.k_transposed + j * z.width * kTile, kTile, k, 3 * z.C, z.rows(j), z.HS);
    tile::pack(m.v + j * kTile * z.width, v, 3 * z.C, z.rows(j), z.HS, 1.0f);
  }
  for (int64_t i = s.first; i < s.last; ++i) forward_query_tile(a, z, m, s.head, i);
}

// ------------------------------------------------------------------------------------------------ backward

/// One thread's memory in the backward pass, likewise.
struct BackwardMemory {
  explicit BackwardMemory(const Sizes& z, float* base = nullptr) {
    const auto take = [&](int64_t count) {
      floats += count;
      return base == nullptr ? nullptr : base + floats - count;
    };
    const int64_t all = z.tiles * kTile;
    q = take(all * z.width);
    dout = take(all * z.width);
    dq_tail = take(all * z.width);
    dq_head = take(all * z.width);
    D = take(all);
    k = take(kTile * z.width);
    dk = take(kTile * z.width);
    dv = take(kTile * z.width);
    k_transposed = take(z.width * kTile);
    v_transposed = take(z.width * kTile);
    p = take(kTile * kTile);
    ds = take(kTile * kTile);
  }
  float *q, *dout;                     // (T, width): scaled queries; gradient of the output
  float *dq_tail, *dq_head;            // (T, width): sums over this thread's key tiles, see dq_of
  float* D;                            // (T)
  float *k, *dk, *dv;                  // (kTile, width)
  float *k_transposed, *v_transposed;  // (width, kTile)
  float *p, *ds;                       // (kTile, kTile): P; dP, then dS
  int64_t floats = 0;
  /// A thread's first segment may be the tail of a head that another thread began, and its last one the head
  /// of one that another thread will end: both wait for the other thread's share, in different places.
  float* dq_of(Segment s) const { return s.first > 0 ? dq_tail : dq_head; }
};

/// From scores and dP of a tile, in place: P = exp(S - lse), dS = P (dP - D).
void softmax_backward(const BackwardMemory& m, const float* lse, const float* D, int64_t rows, int64_t keys,
                      bool diagonal) {
  for (int64_t r = 0; r < rows; ++r) {
    float* const p = m.p + r * kTile;
    float* const ds = m.ds + r * kTile;
    const int64_t n = touched_columns(r, keys, diagonal);
    if (diagonal) std::fill(p + r + 1, p + n, -kInfinity);
    const float lse_r = lse[r], D_r = D[r];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      p[j] = exp_simd(p[j] - lse_r);
      ds[j] = p[j] * (ds[j] - D_r);
    }
  }
}

/// Query tile i against the key tile in m.k: adds to dk, dv and to rows i of dq.
void backward_tile(const Sizes& z, const BackwardMemory& m, float* dq, const float* lse, int64_t i,
                   int64_t keys, bool diagonal, bool first_keys) {
  const int64_t rows = z.rows(i), t = i * kTile, columns = tile::padded(keys);
  const Triangle result = diagonal ? Triangle::lower_c : Triangle::none;
  const auto against_keys = [&](float* c, const float* queries, const float* transposed_keys) {
    tile::multiply({.c = c,
                    .ldc = kTile,
                    .a = queries + t * z.width,
                    .a_row = z.width,
                    .a_col = 1,
                    .b = transposed_keys,
                    .ldb = kTile,
                    .M = rows,
                    .N = columns,
                    .K = z.HS,
                    .add = false,
                    .triangle = result});
  };
  against_keys(m.p, m.q, m.k_transposed);      // scores
  against_keys(m.ds, m.dout, m.v_transposed);  // dP
  softmax_backward(m, lse + t, m.D + t, rows, keys, diagonal);

  const Triangle transposed = diagonal ? Triangle::upper_a : Triangle::none;
  tile::multiply({.c = m.dv,
                  .ldc = z.width,
                  .a = m.p,
                  .a_row = 1,
                  .a_col = kTile,
                  .b = m.dout + t * z.width,
                  .ldb = z.width,
                  .M = keys,
                  .N = z.width,
                  .K = rows,
                  .add = !diagonal,
                  .triangle = transposed});
  tile::multiply({.c = m.dk,
                  .ldc = z.width,
                  .a = m.ds,
                  .a_row = 1,
                  .a_col = kTile,
                  .b = m.q + t * z.width,
                  .ldb = z.width,
                  .M = keys,
                  .N = z.width,
                  .K = rows,
                  .add = !diagonal,
                  .triangle = transposed});
  tile::multiply({.c = dq + t * z.width,
                  .ldc = z.width,
                  .a = m.ds,
                  .a_row = kTile,
                  .a_col = 1,
                  .b = m.k,
                  .ldb = z.width,
                  .M = rows,
                  .N = z.width,
                  .K = keys,
                  .add = !first_keys,
                  .triangle = diagonal ? Triangle::lower_a : Triangle::none});
}

/// Packs q and dout of the queries from tile `first` on, and computes their D.
void prepare_queries(const AttentionBackward& a, const Sizes& z, const BackwardMemory& m, Segment s) {
  const int64_t begin = s.first * kTile, rows = z.T - begin;
  const float* const dout = a.dout.f32() + z.out_offset(s.head, begin);
  const float* const out = a.out.f32() + z.out_offset(s.head, begin);
  tile::pack(m.q + begin * z.width, a.qkv.f32() + z.qkv_offset(s.head, 0, begin), 3 * z.C, rows, z.HS,
             z.scale());
  tile::pack(m.dout + begin * z.width, dout, z.C, rows, z.HS, 1.0f);
  for (int64_t r = 0; r < rows; ++r) m.D[begin + r] = tile::dot(dout + r * z.C, out + r * z.C, z.HS);
}

void backward_segment(const AttentionBackward& a, const Sizes& z, const BackwardMemory& m, Segment s) {
  const float* const qkv = a.qkv.f32();
  float* const dqkv = a.dqkv.f32();
  float* const dq = m.dq_of(s);
  prepare_queries(a, z, m, s);
  std::fill(dq, dq + s.first * kTile * z.width, 0.0f);  // queries before these keys get nothing from them
  for (int64_t j = s.first; j < s.last; ++j) {
    const int64_t t = j * kTile, keys = z.rows(j);
    tile::pack(m.k, qkv + z.qkv_offset(s.head, 1, t), 3 * z.C, keys, z.HS, 1.0f);
    tile::pack_transposed(m.k_transposed, kTile, m.k, z.width, keys, z.HS);
    tile::pack_transposed(m.v_transposed, kTile, qkv + z.qkv_offset(s.head, 2, t), 3 * z.C, keys, z.HS);
    for (int64_t i = j; i < z.tiles; ++i)
      backward_tile(z, m, dq, a.lse.f32() + s.head * z.T, i, keys, i == j, j == s.first);
    tile::unpack(dqkv + z.qkv_offset(s.head, 1, t), 3 * z.C, m.dk, keys, z.HS, 1.0f);
    tile::unpack(dqkv + z.qkv_offset(s.head, 2, t), 3 * z.C, m.dv, keys, z.HS, 1.0f);
  }
  if (s.first == 0 && s.last == z.tiles)
    tile::unpack(dqkv + z.qkv_offset(s.head, 0, 0), 3 * z.C, dq, z.T, z.HS, z.scale());
}

/// Adds up and writes the rows [begin, end) of dq of every head that several threads shared, in thread order.
void add_shared_dq(const AttentionBackward& a, const Sizes& z, const Split& split, float* memory,
                   int64_t begin, int64_t end) {
  const int64_t stride = BackwardMemory(z).floats, first = begin * z.width, count = (end - begin) * z.width;
  for (int64_t t = 0; t < split.threads; ++t) {
    const int64_t stop = split.begin(t + 1), head = stop / z.tiles;
    // Does thread t begin a head that it does not end?
    if (stop == head * z.tiles || split.begin(t) > head * z.tiles) continue;
    float* const dq = BackwardMemory(z, memory + t * stride).dq_head + first;
    for (int64_t u = t + 1; u < split.threads && split.begin(u) < (head + 1) * z.tiles; ++u) {
      if (split.begin(u) == split.begin(u + 1)) continue;  // nothing to do for this thread
      const float* const more = BackwardMemory(z, memory + u * stride).dq_tail + first;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) dq[i] += more[i];
    }
    tile::unpack(a.dqkv.f32() + z.qkv_offset(head, 0, begin), 3 * z.C, dq, end - begin, z.HS, z.scale());
  }
}
}  // namespace

int64_t attention_scratch_bytes(const Context& ctx, int64_t B, int64_t T, int64_t NH, int64_t HS) {
  if constexpr (kHaveGpu)
    if (ctx.where == Where::gpu) return gpu::attention_scratch_bytes(B, T, NH);
  const Sizes z(Tensor(static_cast<float*>(nullptr), {1, T, HS}), 1);
  return ctx.threads * std::max(ForwardMemory(z).floats, BackwardMemory(z).floats) *
         static_cast<int64_t>(sizeof(float));
}

namespace cpu {

void attention_forward(Context& ctx, const AttentionForward& a) {
  const Sizes z(a.out, a.NH);
  const Split split{.heads = z.heads(),
                    .tiles = z.tiles,
                    .descending = false,
                    .threads = std::min<int64_t>(ctx.threads, z.heads() * z.tiles)};
  Scratch::Frame frame(ctx.scratch);
  float* const memory = frame.floats(split.threads * ForwardMemory(z).floats);
  parallel_for(ctx, split.threads, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const ForwardMemory m(z, memory + t * ForwardMemory(z).floats);
      split.for_each_segment(t, [&](Segment s) {
        s.first = std::max(s.first, a.first / kTile);
        if (s.first < s.last) forward_segment(a, z, m, s);
      });
    }
  });
}

void attention_backward(Context& ctx, const AttentionBackward& a) {
  const Sizes z(a.out, a.NH);
  const Split split{.heads = z.heads(),
                    .tiles = z.tiles,
                    .descending = true,
                    .threads = std::min<int64_t>(ctx.threads, z.heads() * z.tiles)};
  Scratch::Frame frame(ctx.scratch);
  float* const memory = frame.floats(split.threads * BackwardMemory(z).floats);
  parallel_for(ctx, split.threads, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const BackwardMemory m(z, memory + t * BackwardMemory(z).floats);
      split.for_each_segment(t, [&](Segment s) { backward_segment(a, z, m, s); });
    }
  });
  parallel_for(ctx, z.T, kTile,
               [&](int64_t begin, int64_t end, int) { add_shared_dq(a, z, split, memory, begin, end); });
}

}  // namespace cpu
