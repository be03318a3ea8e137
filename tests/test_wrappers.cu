// The wrappers of mma.h and what kernels use of the CUDA language, element by element: in the executor these
// tests check its models, on a GPU that the models say what the hardware does.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <random>

#include "model/kernels/mma.h"
#include "tests/device_array.h"
#include "tests/thread_orders.h"

namespace {
/// What a kernel of one block writes, `per_thread` values of T by every thread.
template <typename T, typename... Parameters, typename... Arguments>
std::vector<T> written(unsigned threads, size_t per_thread, size_t shared, void (*kernel)(T*, Parameters...),
                       Arguments... arguments) {
  DeviceArray<T> out(threads * per_thread);
  run_kernel({.grid = 1, .block = threads, .shared = shared}, kernel, out.data(), arguments...);
  return out.values();
}

// ------------------------------------------------------------------------------------------------- ldmatrix

/// Element (row, col) of matrix m is 64 m + 8 row + col.
template <int N, bool kTranspose>
__global__ void load_matrices(uint32_t* out) {
  DYN_SHARED(uint16_t, tile);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < N * 64; i += 32) tile[i] = static_cast<uint16_t>(i);
  __syncwarp();
  uint32_t r[N];
  const uint16_t* row = tile + lane % (8 * N) * 8;
  if constexpr (N == 4 && !kTranspose) ldmatrix_x4(r, row);
  if constexpr (N == 4 && kTranspose) ldmatrix_x4_trans(r, row);
  if constexpr (N == 2 && !kTranspose) ldmatrix_x2(r, row);
  if constexpr (N == 2 && kTranspose) ldmatrix_x2_trans(r, row);
  for (int m = 0; m < N; ++m) out[lane * N + m] = r[m];
}

template <int N, bool kTranspose>
void check_ldmatrix() {
  for_each_thread_order([](const std::string& order) {
    const std::vector<uint32_t> r = written(32, N, 1024, load_matrices<N, kTranspose>);
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < N; ++m)
        for (int j = 0; j < 2; ++j) {
          const int row = lane / 4, col = lane % 4 * 2 + j;
          const int want = 64 * m + (kTranspose ? 8 * col + row : 8 * row + col);
          EXPECT_EQ(r[static_cast<size_t>(lane * N + m)] >> 16 * j & 0xffff, static_cast<unsigned>(want))
              << order << ", lane " << lane << " matrix " << m;
        }
  });
}
TEST(Wrappers, LdmatrixX4) {
  check_ldmatrix<4, false>();
}
TEST(Wrappers, LdmatrixX4Transposed) {
  check_ldmatrix<4, true>();
}
TEST(Wrappers, LdmatrixX2) {
  check_ldmatrix<2, false>();
}
TEST(Wrappers, LdmatrixX2Transposed) {
  check_ldmatrix<2, true>();
}

// ------------------------------------------------------------------------------------------------------ mma

__device__ uint32_t pack(bf16 low, bf16 high) {
  return uint32_t{__bfloat16_as_ushort(low)} | uint32_t{__bfloat16_as_ushort(high)} << 16;
}
/// Fragments by the table of mma.h; a (16, 16) and b (16, 8) row-major, d (16, 8).
__global__ void multiply_fragments(float* d, const bf16* a, const bf16* b, const float* c) {
  const int g = static_cast<int>(threadIdx.x) / 4, q = static_cast<int>(threadIdx.x) % 4;
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) {
    const bf16* from = a + (g + i % 2 * 8) * 16 + 2 * q + i / 2 * 8;
    left[i] = pack(from[0], from[1]);
  }
  for (int i = 0; i < 2; ++i) {
    const bf16* from = b + (2 * q + 8 * i) * 8 + g;
    right[i] = pack(from[0], from[8]);
  }
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = c[(g + i / 2 * 8) * 8 + 2 * q + i % 2];
  mma_bf16(sums, left, right[0], right[1]);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = sums[i];
}

TEST(Wrappers, MmaIsExactForIntegersAndPutsEachInItsPlace) {
  std::vector<bf16> a, b;
  std::vector<float> c;
  for (int i = 0; i < 256; ++i) a.push_back(static_cast<float>(i));
  for (int i = 0; i < 128; ++i) {
    b.push_back(static_cast<float>(i * 37 % 127 - 63));
    c.push_back(static_cast<float>(1000 * i));
  }
  const DeviceArray<bf16> device_a(a), device_b(b);
  const DeviceArray<float> device_c(c);
  for_each_thread_order([&](const std::string& order) {
    const std::vector<float> d =
        written(32, 4, 0, multiply_fragments, device_a.data(), device_b.data(), device_c.data());
    for (size_t row = 0; row < 16; ++row)
      for (size_t col = 0; col < 8; ++col) {
        float want = c[row * 8 + col];
        for (size_t k = 0; k < 16; ++k)
          want += __bfloat162float(a[row * 16 + k]) * __bfloat162float(b[k * 8 + col]);
        EXPECT_EQ(d[row * 8 + col], want) << order << ", " << row << "," << col;
      }
  });
}

// ------------------------------------------------------------------------------------------------- cp.async

/// Each thread copies `bytes` bytes, threads 8 and up zeros; neighbours exchange them.
template <int kBytes>
__global__ void copy_and_exchange(uint32_t* out, const uint32_t* x) {
  DYN_SHARED(uint32_t, tile);
  constexpr int kWords = kBytes / 4;
  const int t = static_cast<int>(threadIdx.x);
  const bool valid = t < 8;
  if constexpr (kBytes == 4) cp_async4(tile + t * kWords, x + t * kWords, valid);
  if constexpr (kBytes == 8) cp_async8(tile + t * kWords, x + t * kWords, valid);
  if constexpr (kBytes == 16) cp_async16(tile + t * kWords, x + t * kWords, valid);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < kWords; ++i) out[t * kWords + i] = tile[(t ^ 1) * kWords + i];
}
template <int kBytes>
void check_copies() {
  std::vector<uint32_t> x(32 * kBytes / 4);
  std::iota(x.begin(), x.end(), 100u);
  const DeviceArray<uint32_t> from(x);
  for_each_thread_order([&](const std::string& order) {
    const auto out = written(32, kBytes / 4, 32 * kBytes, copy_and_exchange<kBytes>, from.data());
    for (size_t i = 0; i < out.size(); ++i) {
      const size_t source = (i * 4 / kBytes ^ 1) * kBytes / 4 + i % (kBytes / 4);
      EXPECT_EQ(out[i], source * 4 / kBytes < 8 ? x[source] : 0) << order << " " << i;
    }
  });
}
TEST(Wrappers, CpAsync16) {
  check_copies<16>();
}
TEST(Wrappers, CpAsync8) {
  check_copies<8>();
}
TEST(Wrappers, CpAsync4) {
  check_copies<4>();
}

/// Each thread writes four words that its neighbour has.
__global__ void store_neighbours(uint32_t* out, const uint32_t* x) {
  const int t = static_cast<int>(threadIdx.x);
  store_global16(out + t * 4, *reinterpret_cast<const int4*>(x + (t ^ 1) * 4));
}
TEST(Wrappers, StoreGlobal16) {
  std::vector<uint32_t> x(32 * 4);
  std::iota(x.begin(), x.end(), 100u);
  const DeviceArray<uint32_t> from(x);
  const auto out = written(32, 4, 0, store_neighbours, from.data());
  for (size_t i = 0; i < out.size(); ++i) EXPECT_EQ(out[i], x[i ^ 4]) << i;
}

// ------------------------------------------------------------------------------------------- named barriers

/// Two pairs of warps with a barrier each, at different times; then a warp that produces for two.
__global__ void pairs_of_warps(int* out) {
  DYN_SHARED(int, tile);
  const int t = static_cast<int>(threadIdx.x), pair = t / 64;
  for (int round = 0; round <= pair; ++round) {
    tile[t] = t + 1000 * round;
    named_barrier(1 + pair, 64);
    out[t] = tile[t ^ 32];
    named_barrier(1 + pair, 64);
  }
  if (t < 32) {
    tile[t] = 5000 + t;
    named_barrier_arrive(3, 96);
  } else if (t < 96) {
    named_barrier(3, 96);
    out[t] += tile[t % 32];
  }
}
TEST(Wrappers, NamedBarriersAreIndependent) {
  for_each_thread_order([](const std::string& order) {
    const auto out = written(128, 1, 512, pairs_of_warps);
    for (int t = 0; t < 128; ++t) {
      const int exchanged = (t ^ 32) + (t < 64 ? 0 : 1000), produced = t >= 32 && t < 96 ? 5000 + t % 32 : 0;
      EXPECT_EQ(out[static_cast<size_t>(t)], exchanged + produced) << order << ", thread " << t;
    }
  });
}

__global__ void count_votes(int* out) {
  const int t = static_cast<int>(threadIdx.x);
  int* mine = out + 5 * t;
  mine[0] = __syncthreads_count(t % 3 == 0);
  mine[1] = __syncthreads_or(t == 95);
  mine[2] = __syncthreads_or(t == 96);
  mine[3] = __syncthreads_and(t < 96);
  mine[4] = __syncthreads_and(t < 95);
}
TEST(Wrappers, BlockVotes) {
  for_each_thread_order([](const std::string& order) {
    const auto out = written(96, 5, 0, count_votes);
    for (size_t t = 0; t < 96; ++t) {
      EXPECT_EQ(out[5 * t], 32) << order;
      EXPECT_NE(out[5 * t + 1], 0) << order;
      EXPECT_EQ(out[5 * t + 2], 0) << order;
      EXPECT_NE(out[5 * t + 3], 0) << order;
      EXPECT_EQ(out[5 * t + 4], 0) << order;
    }
  });
}

// ------------------------------------------------------------------------------------------ warp intrinsics

constexpr int kShuffles = 10;
__global__ void shuffle(int* out) {
  const int t = static_cast<int>(threadIdx.x), value = 100 + t;
  int* mine = out + kShuffles * t;
  mine[0] = __shfl_sync(kFullMask, value, 5);
  mine[1] = __shfl_sync(kFullMask, value, t + 1);  // the lane modulo the width
  mine[2] = __shfl_sync(kFullMask, value, 3, 8);
  mine[3] = __shfl_xor_sync(kFullMask, value, 16);
  mine[4] = __shfl_xor_sync(kFullMask, value, 3, 4);
  mine[5] = __shfl_down_sync(kFullMask, value, 4);
  mine[6] = __shfl_up_sync(kFullMask, value, 4);
  mine[7] = __shfl_down_sync(kFullMask, value, 3, 8);
  mine[8] = __shfl_up_sync(kFullMask, value, 3, 8);
  mine[9] = __shfl_xor_sync(kFullMask, value, 4, 4);  // into another segment: earlier ones can be read
}
TEST(Wrappers, Shuffles) {
  for_each_thread_order([](const std::string& order) {
    const auto out = written(32, kShuffles, 0, shuffle);
    for (int t = 0; t < 32; ++t) {
      const int want[kShuffles] = {5,
                                   (t + 1) % 32,
                                   t / 8 * 8 + 3,
                                   t ^ 16,
                                   t ^ 3,
                                   t < 28 ? t + 4 : t,
                                   t >= 4 ? t - 4 : t,
                                   t % 8 < 5 ? t + 3 : t,
                                   t % 8 >= 3 ? t - 3 : t,
                                   t % 8 >= 4 ? t - 4 : t};
      for (int i = 0; i < kShuffles; ++i)
        EXPECT_EQ(out[static_cast<size_t>(t * kShuffles + i)], 100 + want[i])
            << order << ", lane " << t << " " << i;
    }
  });
}

/// Quarters of a warp loop a different number of times, each under its own mask.
__global__ void sub_warps(int* out) {
  const int t = static_cast<int>(threadIdx.x), quarter = t / 8;
  const unsigned mask = 0xffu << (8 * quarter);
  int sum = 0;
  for (int round = 0; round <= quarter; ++round) {
    int value = t + round;
    for (int offset = 4; offset > 0; offset /= 2) value += __shfl_xor_sync(mask, value, offset);
    sum += value;
    __syncwarp(mask);
  }
  out[3 * t] = sum;
  out[3 * t + 1] = static_cast<int>(__ballot_sync(mask, t % 2));
  out[3 * t + 2] = __any_sync(mask, t == 9) * 2 + (__all_sync(mask, t >= 8) != 0);
}
TEST(Wrappers, CollectivesOfPartsOfAWarp) {
  for_each_thread_order([](const std::string& order) {
    const auto out = written(32, 3, 0, sub_warps);
    for (int t = 0; t < 32; ++t) {
      const int quarter = t / 8;
      int sum = 0;
      for (int round = 0; round <= quarter; ++round) sum += 64 * quarter + 28 + 8 * round;
      const auto* mine = &out[static_cast<size_t>(3 * t)];
      EXPECT_EQ(mine[0], sum) << order << ", lane " << t;
      EXPECT_EQ(static_cast<unsigned>(mine[1]), 0xaau << (8 * quarter)) << order;
      EXPECT_EQ(mine[2] != 0, quarter > 0) << order;
      EXPECT_EQ(mine[2] / 2 != 0, quarter == 1) << order;
    }
  });
}

__global__ void reduce_and_match(unsigned* out) {
  const unsigned t = threadIdx.x;
  out[5 * t] = __reduce_add_sync(kFullMask, t);
  out[5 * t + 1] = __reduce_max_sync(kFullMask, t ^ 21u);
  out[5 * t + 2] = __reduce_min_sync(kFullMask, 50u - t);
  out[5 * t + 3] = __match_any_sync(kFullMask, t % 4);
  const double wide = __shfl_sync(kFullMask, 1.0 / (t + 1), 2);
  const float half = to_float(__shfl_sync(kFullMask, from_float<bf16>(static_cast<float>(t)), 7));
  out[5 * t + 4] = wide == 1.0 / 3 && half == 7.0f;
}
TEST(Wrappers, ReductionsAndMatches) {
  for_each_thread_order([](const std::string& order) {
    const auto out = written(32, 5, 0, reduce_and_match);
    for (size_t t = 0; t < 32; ++t) {
      EXPECT_EQ(out[5 * t], 496u) << order;
      EXPECT_EQ(out[5 * t + 1], 31u) << order;
      EXPECT_EQ(out[5 * t + 2], 19u) << order;
      EXPECT_EQ(out[5 * t + 3], 0x11111111u << t % 4) << order;
      EXPECT_EQ(out[5 * t + 4], 1u) << order << ": 8 and 2 bytes";
    }
  });
}

// -------------------------------------------------------------------------------------------------- atomics

__global__ void count(unsigned* u, int* i, float* f, unsigned long long* l) {
  const int t = static_cast<int>(threadIdx.x + blockIdx.x * blockDim.x);
  atomicAdd(&u[0], 1u);
  atomicInc(&u[1], 9u);
  atomicOr(&u[2], 1u << t % 32);
  atomicMax(&i[0], t);
  atomicMin(&i[1], -t);
  atomicCAS(&i[2], 0, 7);
  atomicCAS(&i[2], 3, 8);
  atomicExch(&i[3], 5);
  atomicAdd(f, 0.5f);
  atomicAdd(l, 1ull << 32);
}
TEST(Wrappers, Atomics) {
  for_each_thread_order([](const std::string& order) {
    const DeviceArray<unsigned> u(std::vector<unsigned>(3));
    const DeviceArray<int> i(std::vector<int>(4));
    const DeviceArray<float> f(std::vector<float>(1));
    const DeviceArray<unsigned long long> l(std::vector<unsigned long long>(1));
    run_kernel({.grid = 16, .block = 64}, count, u.data(), i.data(), f.data(), l.data());
    EXPECT_EQ(u.values(), (std::vector<unsigned>{1024, 4, ~0u})) << order;
    EXPECT_EQ(i.values(), (std::vector<int>{1023, -1023, 7, 5})) << order;
    EXPECT_EQ(f.values()[0], 512.0f) << order;
    EXPECT_EQ(l.values()[0], 1024ull << 32) << order;
  });
}

// ---------------------------------------------------------------------------------------------- conversions

__global__ void round_to_bf16(uint16_t* out, const float* x, int n) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += 32)
    out[i] = __bfloat16_as_ushort(__float2bfloat16_rn(x[i]));
}

/// Floats that are hard to round: every bf16 pattern with lower halves around a tie.
TEST(Wrappers, Bf16RoundsToNearestEvenForEveryPattern) {
  std::vector<float> x;
  for (uint32_t high = 0; high < 0x10000; ++high)
    for (uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu})
      x.push_back(std::bit_cast<float>(high << 16 | low));
  const DeviceArray<float> from(x);
  const DeviceArray<uint16_t> to(x.size());
  run_kernel({.grid = 1, .block = 32}, round_to_bf16, to.data(), from.data(), static_cast<int>(x.size()));
  const std::vector<uint16_t> got = to.values();
  const auto value = [](uint32_t bits) { return std::bit_cast<float>(bits << 16); };
  for (size_t i = 0; i < x.size(); ++i) {
    if (std::isnan(x[i])) {
      ASSERT_EQ(got[i], 0x7fff) << "a NaN becomes the one NaN";
      continue;
    }
    // In float64: the nearer of the two neighbours, the even one at a tie; beyond the largest, what would
    // follow it.
    const uint32_t down = std::bit_cast<uint32_t>(x[i]) >> 16;
    const double next =
        (down & 0x7fff) == 0x7f7f ? std::copysign(std::ldexp(1.0, 128), x[i]) : value(down + 1);
    const double to_down = std::abs(x[i] - double{value(down)}), to_up = std::abs(next - x[i]);
    const bool up = std::isfinite(x[i]) && (to_up < to_down || (to_up == to_down && down % 2 == 1));
    ASSERT_EQ(got[i], down + (up ? 1 : 0)) << std::hexfloat << x[i];
  }
}
}  // namespace
