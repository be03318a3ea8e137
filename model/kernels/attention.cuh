// What the CUDA halves of attention share. Two families of kernels do the same work:
//   attention_mma_*.cu  bf16 with heads of 64 or 128 numbers, on tensor cores
//   attention.cu        everything else: float32 arithmetic, any head size; also the oracle of the fast
//   family
#pragma once

#include "model/kernels/attention.h"
#include "model/kernels/cuda.h"

inline constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

/// Sizes, and where the rows of a head lie. Positions are ints, offsets are 64 bits wide.
struct AttentionSizes {
  int T, C, NH, HS;
  int heads;     // B * NH, numbered b * NH + h
  float scale;   // 1 / sqrt(HS)
  float scale2;  // scale log2(e), for exponentials in powers of two

  AttentionSizes(const Tensor& out, int64_t heads_per_entry)
      : T(static_cast<int>(out.shape[1])),
        C(static_cast<int>(out.shape[2])),
        NH(static_cast<int>(heads_per_entry)),
        HS(C / NH),
        heads(static_cast<int>(out.shape[0]) * NH),
        scale(static_cast<float>(1.0 / std::sqrt(static_cast<double>(HS)))),
        scale2(scale * kLog2E) {}

  /// Row 0 of a head in a (B, T, C) tensor; rows are C apart.
  __host__ __device__ int64_t out_offset(int head) const {
    return int64_t{head / NH} * T * C + head % NH * HS;
  }
  /// The same in a (B, T, 3C) tensor, where rows are 3C apart; part is 0 for q, 1 for k, 2 for v.
  __host__ __device__ int64_t qkv_offset(int head, int part) const {
    return int64_t{head / NH} * T * 3 * C + int64_t{part} * C + head % NH * HS;
  }
  /// Tiles of `rows` positions.
  __host__ __device__ int tiles(int rows) const { return (T + rows - 1) / rows; }

  /// Per query, the backward pass needs lse and D. They lie in scratch as (heads, 2, padded T), with rows
  /// aligned to 16 bytes: first lse * log2(e), then D. Whoever reads beyond T takes zeros, as for rows of q
  /// and dout there: then dP - D and dS are zero, and P is 1, times a zero row of dout.
  static constexpr int kPad = 4;
  __host__ __device__ int padded() const { return tiles(kPad) * kPad; }
  __host__ __device__ int64_t stats_offset(int head) const { return int64_t{head} * 2 * padded(); }
};

/// A row's largest score, from the running maximum, which passes over a NaN, and the sum of the exponentials,
/// which does not and is finite otherwise.
__device__ __forceinline__ float with_nan(float max, float sum) {
  return max + 0.0f * sum;
}

/// The fast family. It takes what `takes` says; pointers must be aligned to 16 bytes.
namespace attention_mma {
inline bool takes(const AttentionSizes& z) {
  return z.HS == 64 || z.HS == 128;
}
void forward(Context& ctx, const AttentionForward& a, const AttentionSizes& z);
/// Fills `stats`, as above.
void backward(Context& ctx, const AttentionBackward& a, const AttentionSizes& z, float* stats);
}  // namespace attention_mma
