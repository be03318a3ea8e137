// Tensor cores and asynchronous copies for sm_80 and later: thin wrappers of PTX, each beside its CPU model.
//
// ldmatrix_x4: four 8x8 matrices of bf16 from shared memory. Lane l names the 16-byte row l % 8 of matrix l /
// 8; afterwards it holds in r[m] elements (l / 4, l % 4 * 2 + {0, 1}) of matrix m (of its transpose with
// _trans). ldmatrix_x2: the same for two matrices, named by lanes 0 to 15.
//
// mma_bf16: d (16x8, f32) += a (16x16, row-major) b (16x8, given column by column). Lane l, g = l / 4, q = l
// % 4:
//   d[0..1] = (g, 2q + {0, 1})        d[2..3] = (g + 8, 2q + {0, 1})
//   a[0] = (g, 2q + {0, 1})  a[1] = (g + 8, same)  a[2] = (g, 2q + 8 + {0, 1})  a[3] = (g + 8, same)
//   b0   = rows k = 2q + {0, 1}, column g          b1   = rows k = 2q + 8 + {0, 1}, column g
//
// cp_async16 copies 16 aligned bytes from global to shared memory, or writes zeros when `valid` is false;
// nothing is there before the cp_async_wait that covers its group, and nothing is visible to other threads
// before a barrier. cp_async4 and cp_async8 do so for 4 and 8 bytes.
//
// store_global16 writes 16 aligned bytes to global memory with one instruction.
//
// All 32 lanes of a warp call the matrix operations together.
#pragma once

#include "model/kernels/cuda.h"

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void cp_async16(void* to_shared, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(to_shared)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async8(void* to_shared, const void* from, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
               :
               : "r"(shared_address(to_shared)), "l"(from), "r"(valid ? 8 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async4(void* to_shared, const void* from, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :
               : "r"(shared_address(to_shared)), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Waits until at most N of this thread's newest groups are still on their way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/// Writes 16 aligned bytes to global memory at once. A copy of a struct from shared memory becomes four
/// stores.
__device__ __forceinline__ void store_global16(void* to, const int4& words) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

/// Barrier `id` (1..15) for `threads` threads, a multiple of 32; 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/// Counts as having come to barrier `id`, and goes on: for the one who makes what others wait for.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#else

/// Each lane brings its row; everybody takes two elements of each matrix.
template <int N>
void ldmatrix_model(uint32_t (&r)[N], const void* row, bool transpose,
                    const cuda_on_cpu::Operation& operation) {
  const int lane = cuda_on_cpu::current_thread->lane;
  struct Row {
    uint16_t element[8];
  } mine{};
  if (lane < 8 * N) {  // the other lanes' addresses are not used
    cuda_on_cpu::check_aligned(row, 16, operation.name);
    mine = *static_cast<const Row*>(row);
  }
  const cuda_on_cpu::Deposits& all =
      cuda_on_cpu::meet(~0u, operation, cuda_on_cpu::Orders::memory, &mine, sizeof mine);
  const int i = lane / 4, k = lane % 4 * 2;
  for (int m = 0; m < N; ++m) {
    const auto element = [&](int row, int col) -> uint32_t { return all.of<Row>(m * 8 + row).element[col]; };
    r[m] = transpose ? element(k, i) | element(k + 1, i) << 16 : element(i, k) | element(i, k + 1) << 16;
  }
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row,
                        std::source_location where = std::source_location::current()) {
  ldmatrix_model(r, row, false, {"ldmatrix_x4", where});
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row,
                              std::source_location where = std::source_location::current()) {
  ldmatrix_model(r, row, true, {"ldmatrix_x4_trans", where});
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row,
                        std::source_location where = std::source_location::current()) {
  ldmatrix_model(r, row, false, {"ldmatrix_x2", where});
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row,
                              std::source_location where = std::source_location::current()) {
  ldmatrix_model(r, row, true, {"ldmatrix_x2_trans", where});
}

struct MmaOperands {
  uint32_t a[4], b[2];
};
/// The whole product a b, by one lane for all.
inline void mma_model(cuda_on_cpu::Deposits& all) {
  float a[16][16], b[16][8];
  const auto low = [](uint32_t x) { return cuda_on_cpu::bf16_bits_to_float(static_cast<uint16_t>(x)); };
  const auto high = [](uint32_t x) {
    return cuda_on_cpu::bf16_bits_to_float(static_cast<uint16_t>(x >> 16));
  };
  for (int lane = 0; lane < 32; ++lane) {
    const auto mine = all.of<MmaOperands>(lane);
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) {
      a[g + i % 2 * 8][2 * q + i / 2 * 8] = low(mine.a[i]);
      a[g + i % 2 * 8][2 * q + i / 2 * 8 + 1] = high(mine.a[i]);
    }
    for (int i = 0; i < 2; ++i) {
      b[2 * q + i * 8][g] = low(mine.b[i]);
      b[2 * q + i * 8 + 1][g] = high(mine.b[i]);
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sums[8];
    cuda_on_cpu::sum_products(sums, a[row], b);
    for (int col = 0; col < 8; ++col) all.results[row % 8 * 4 + col / 2][row / 8 * 2 + col % 2] = sums[col];
  }
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     std::source_location where = std::source_location::current()) {
  const MmaOperands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto& all =
      cuda_on_cpu::meet(~0u, {"mma_bf16", where}, cuda_on_cpu::Orders::memory, &mine, sizeof mine, mma_model);
  for (int i = 0; i < 4; ++i)
    d[i] = cuda_on_cpu::plus_products(d[i], all.results[cuda_on_cpu::current_thread->lane][i]);
}

inline void cp_async_model(void* to_shared, const void* from, size_t bytes, bool valid) {
  cuda_on_cpu::check_aligned(to_shared, bytes, "cp_async");
  cuda_on_cpu::check_aligned(from, bytes, "cp_async");
  cuda_on_cpu::current_thread->copies.start(to_shared, from, bytes, valid ? bytes : 0);
}
inline void cp_async16(void* to_shared, const void* from, bool valid = true) {
  cp_async_model(to_shared, from, 16, valid);
}
inline void cp_async8(void* to_shared, const void* from, bool valid = true) {
  cp_async_model(to_shared, from, 8, valid);
}
inline void cp_async4(void* to_shared, const void* from, bool valid = true) {
  cp_async_model(to_shared, from, 4, valid);
}
inline void cp_async_commit() {
  cuda_on_cpu::current_thread->copies.commit();
}
template <int N>
void cp_async_wait() {
  cuda_on_cpu::current_thread->copies.wait(N);
}

inline void store_global16(void* to, const int4& words) {
  cuda_on_cpu::check_aligned(to, 16, "store_global16");
  *static_cast<int4*>(to) = words;
}

inline void named_barrier(int id, int threads, std::source_location where = std::source_location::current()) {
  cuda_on_cpu::barrier(id, threads, {"named_barrier", where});
}
inline void named_barrier_arrive(int id, int threads,
                                 std::source_location where = std::source_location::current()) {
  cuda_on_cpu::arrive(id, threads, {"named_barrier_arrive", where});
}

#endif
