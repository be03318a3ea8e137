// sm_90a: copies by the Tensor Memory Accelerator (TMA), mbarriers, and wgmma, the tensor-core products of a
// warpgroup (128 threads). Thin wrappers of PTX, each beside its CPU model, as in mma.h. Kernels that use
// them have their body in `if constexpr`-like brackets, so that other architectures compile to nothing:
//
//   __global__ void kernel(const __grid_constant__ TensorMap map) {
//   #if HOPPER_CODE
//     ...
//   #endif
//   }
//
// A tile and its layout. TMA copies boxes of `box_rows` rows of 64 bf16 (128 bytes) into shared memory, which
// must be aligned to 1024 bytes (DYN_SHARED is, and so is any multiple of 8 rows behind it). Rows lie one
// behind the other; inside of each group of 8 rows the 16-byte chunks are permuted: chunk c of row r is at
// chunk c ^ (r % 8)
// ("128-byte swizzle"), so that neither rows nor columns collide in banks. What lies outside of the matrix
// arrives as zeros.
//
// mbarrier: counts arrivals and bytes. A phase is complete when as many arrivals have come as mbarrier_init
// said and all announced bytes have been copied; the next phase begins by itself. Phases have parities 0, 1,
// 0, ...; mbarrier_wait(b, parity) returns when the phase of that parity is complete; so a wait for parity 1
// on a fresh barrier returns at once. Ring of S stages, round n of a stage: the consumer waits for full with
// parity n % 2, the producer for empty with parity 1 - n % 2.
//
// wgmma_k16<N>: d (64xN, f32) += a (64x16) b^T (Nx16), both in shared memory, given by descriptors of their
// first element: wgmma_descriptor(tile) + 2 for each further 16 columns. Thread t of the warpgroup, w = t /
// 32, l = t % 32:
//   d[4j + 2h + c] = (16w + l / 4 + 8h, 8j + l % 4 * 2 + c)                              h, c in {0, 1}
// Sums are there after the wgmma_wait that covers their group; until then neither they nor the tiles may be
// touched. Before the first product, and after touching sums: wgmma_fence. All 128 threads call all of these.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>

#include "model/kernels/mma.h"

#ifdef __CUDACC__

#include <cuda.h>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER_CODE 1
#else
#define HOPPER_CODE 0
#endif

using TensorMap = CUtensorMap;

// ------------------------------------------------------------------------------------------------ mbarriers
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}
/// After the inits and before the barrier that shows them to others: lets TMA see them too.
__device__ __forceinline__ void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
/// Announces bytes that copies will bring in this phase, and arrives.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
  uint32_t complete = 0;
  while (complete == 0)
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
}
/// Between writing shared memory with ordinary stores and letting TMA or wgmma read it.
__device__ __forceinline__ void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ------------------------------------------------------------------------------------------------------ TMA
/// One thread copies the box whose first element is (row, col); the bytes count on the mbarrier.
__device__ __forceinline__ void tma_load(void* to_shared, const TensorMap& map, uint64_t* barrier, int row,
                                         int col) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(shared_address(to_shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(col), "r"(row)
      : "memory");
}

// ---------------------------------------------------------------------------------------------------- wgmma
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits until at most N of the newest groups are still going.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#define WGMMA_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_SUMS_16(i) WGMMA_SUMS_4(i), WGMMA_SUMS_4(i + 4), WGMMA_SUMS_4(i + 8), WGMMA_SUMS_4(i + 12)
__device__ __forceinline__ void wgmma_m64n64k16(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
      "%24,%25,%26,%27,%28,%29,%30,%31"
      "}, %32, %33, 1, 1, 1, 0, 0;"
      : WGMMA_SUMS_16(0), WGMMA_SUMS_16(16)
      : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
      "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,"
      "%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
      "}, %64, %65, 1, 1, 1, 0, 0;"
      : WGMMA_SUMS_16(0), WGMMA_SUMS_16(16), WGMMA_SUMS_16(32), WGMMA_SUMS_16(48)
      : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma_m64n256k16(float (&d)[128], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
      "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,"
      "%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,"
      "%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,"
      "%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,"
      "%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,"
      "%126,%127"
      "}, %128, %129, 1, 1, 1, 0, 0;"
      : WGMMA_SUMS_16(0), WGMMA_SUMS_16(16), WGMMA_SUMS_16(32), WGMMA_SUMS_16(48), WGMMA_SUMS_16(64),
        WGMMA_SUMS_16(80), WGMMA_SUMS_16(96), WGMMA_SUMS_16(112)
      : "l"(a), "l"(b));
}
#undef WGMMA_SUMS_4
#undef WGMMA_SUMS_16

template <int N>
__device__ __forceinline__ void wgmma_k16(float (&d)[N / 2], uint64_t a, uint64_t b) {
  static_assert(N == 64 || N == 128 || N == 256);
  if constexpr (N == 64) wgmma_m64n64k16(d, a, b);
  if constexpr (N == 128) wgmma_m64n128k16(d, a, b);
  if constexpr (N == 256) wgmma_m64n256k16(d, a, b);
}

// ------------------------------------------------------------------------------------------------ host side
/// Describes a row-major bf16 matrix for tma_load, with boxes of box_rows rows (at most 256) by 64 columns.
/// The matrix must be aligned to 16 bytes, its rows too (cols a multiple of 8).
inline TensorMap tensor_map(const bf16* matrix, int64_t rows, int64_t cols, int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  // Asked of the driver by name: the program does not link libcuda, and starts on machines without it.
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                                &found));
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("this driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(function);
  }();
  TensorMap map;
  const cuuint64_t size[] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[] = {static_cast<cuuint64_t>(cols) * sizeof(bf16)};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows)}, step[] = {1, 1};
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<bf16*>(matrix), size,
                                 pitch, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
  return map;
}

#else

#define HOPPER_CODE 1

/// Shared memory has 32-bit addresses on a GPU; here they are offsets in the block's dynamic shared memory.
inline uint32_t shared_address(const void* p) {
  return cuda_on_cpu::shared_offset(p, "shared_address");
}

// ------------------------------------------------------------------------------------------------ mbarriers
/// What the model keeps in the 64 bits of an mbarrier. Bytes may arrive before they are announced.
struct MbarrierModel {
  uint16_t arrivals, missing;  // per phase; still to come in this one
  int32_t bytes : 31;          // announced and not yet copied
  uint32_t phase : 1;

  static MbarrierModel& of(uint64_t* barrier) {
    cuda_on_cpu::check_aligned(barrier, 8, "mbarrier");
    auto& model = *reinterpret_cast<MbarrierModel*>(barrier);
    if (model.arrivals == 0xffff) cuda_on_cpu::fail("an mbarrier is used before mbarrier_init");
    return model;
  }
  void complete_phase_if_done() {
    if (missing != 0 || bytes != 0) return;
    missing = arrivals;
    phase ^= 1;
  }
  /// For the race detector: one token per parity, as a slow thread must not see what the next phase brings.
  void* token(unsigned of_phase) { return reinterpret_cast<char*>(this) + of_phase; }
};
static_assert(sizeof(MbarrierModel) == 8);

inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  const cuda_on_cpu::Unobserved unobserved;
  cuda_on_cpu::check_aligned(barrier, 8, "mbarrier_init");
  if (arrivals < 1 || arrivals > 1024) cuda_on_cpu::fail("mbarrier_init: %d arrivals", arrivals);
  const auto count = static_cast<uint16_t>(arrivals);
  *reinterpret_cast<MbarrierModel*>(barrier) = {.arrivals = count, .missing = count, .bytes = 0, .phase = 0};
}
inline void mbarrier_fence_init() {}
inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  const cuda_on_cpu::Unobserved unobserved;
  MbarrierModel& model = MbarrierModel::of(barrier);
  cuda_on_cpu::happens_before(model.token(model.phase));
  if (model.missing == 0) cuda_on_cpu::fail("mbarrier: more than %d arrivals in one phase", model.arrivals);
  model.bytes += bytes;
  --model.missing;
  model.complete_phase_if_done();
}
inline void mbarrier_arrive(uint64_t* barrier) {
  mbarrier_arrive_expect(barrier, 0);
}
inline void mbarrier_wait(uint64_t* barrier, int parity,
                          std::source_location where = std::source_location::current()) {
  const cuda_on_cpu::Unobserved unobserved;
  MbarrierModel& model = MbarrierModel::of(barrier);
  const auto awaited = static_cast<unsigned>(parity) & 1;
  cuda_on_cpu::wait_until([&] { return model.phase != awaited; }, {"mbarrier_wait", where},
                          [&] {
                            return "phase " + std::to_string(awaited) + " lacks " +
                                   std::to_string(model.missing) + " of " + std::to_string(model.arrivals) +
                                   " arrivals and " + std::to_string(model.bytes) + " bytes";
                          });
  cuda_on_cpu::happens_after(model.token(awaited));
}
inline void fence_async() {}

// ------------------------------------------------------------------------------------------------------ TMA
struct TensorMap {
  const bf16* matrix;
  int64_t rows, cols;
  int box_rows;
};
inline TensorMap tensor_map(const bf16* matrix, int64_t rows, int64_t cols, int box_rows) {
  if (reinterpret_cast<uintptr_t>(matrix) % 16 != 0 || cols % 8 != 0 || box_rows < 1 || box_rows > 256)
    throw std::runtime_error(
        "tensor_map: the matrix and its rows must be aligned to 16 bytes, boxes at most 256 rows");
  return {matrix, rows, cols, box_rows};
}

/// Where the chunk at an offset of a tile goes: bits 4 to 6 are exchanged with bits 7 to 9 added without
/// carry.
inline uint32_t swizzle_128(uint32_t address) {
  return address ^ (address >> 3 & 0x70);
}

inline void copy_box(unsigned char* to, const TensorMap& map, int row, int col) {
  for (int r = 0; r < map.box_rows; ++r)
    for (int c = 0; c < 64; ++c) {
      const bool inside = row + r >= 0 && row + r < map.rows && col + c >= 0 && col + c < map.cols;
      const uint16_t value = inside ? map.matrix[int64_t{row + r} * map.cols + col + c].bits : 0;
      std::memcpy(to + swizzle_128(static_cast<uint32_t>(r * 128 + c * 2)), &value, 2);
    }
}
inline void tma_load(void* to_shared, const TensorMap& map, uint64_t* barrier, int row, int col) {
  cuda_on_cpu::check_aligned(to_shared, 1024, "tma_load");
  auto* to = static_cast<unsigned char*>(to_shared);
  const int bytes = map.box_rows * 128;
  cuda_on_cpu::shared_offset(to, "tma_load");
  cuda_on_cpu::shared_offset(to + bytes - 1, "tma_load");
  std::memset(to, cuda_on_cpu::kPoisonByte, static_cast<size_t>(bytes));
  const cuda_on_cpu::Unobserved unobserved;
  MbarrierModel& model = MbarrierModel::of(barrier);
  cuda_on_cpu::happens_before(model.token(model.phase));
  cuda_on_cpu::current_block->engine.push_back([=, &model] {
    copy_box(to, map, row, col);
    model.bytes -= bytes;
    model.complete_phase_if_done();
  });
}

// ---------------------------------------------------------------------------------------------------- wgmma
inline void wgmma_fence() {
  cuda_on_cpu::current_thread->products.fenced = true;
}
inline void wgmma_commit() {
  cuda_on_cpu::current_thread->products.commit();
}
/// The sums are made here, between two barriers: when one warp's wait is over, nobody reads the tiles any
/// more.
template <int N>
void wgmma_wait(std::source_location where = std::source_location::current()) {
  cuda_on_cpu::warpgroup_barrier({"wgmma_wait", where});
  cuda_on_cpu::current_thread->products.wait(N);
  cuda_on_cpu::warpgroup_barrier({"wgmma_wait", where});
}

/// 16 elements of one row of an operand, by its descriptor: rows are 128 bytes apart, groups of 8 rows as far
/// as bits 32 to 45 say.
inline void load_wgmma_row(float (&values)[16], uint64_t descriptor, int row) {
  const auto first = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const auto group = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  const uint32_t at = first + static_cast<uint32_t>(row / 8) * group + static_cast<uint32_t>(row % 8) * 128;
  for (uint32_t chunk = 0; chunk < 2; ++chunk) {
    const unsigned char* from = cuda_on_cpu::current_block->shared + swizzle_128(at + chunk * 16);
    cuda_on_cpu::shared_offset(from, "wgmma");
    uint16_t bits[8];
    std::memcpy(bits, from, sizeof bits);
    for (int i = 0; i < 8; ++i)
      values[chunk * 8 + static_cast<uint32_t>(i)] = cuda_on_cpu::bf16_bits_to_float(bits[i]);
  }
}

template <int N>
void wgmma_k16(float (&d)[N / 2], uint64_t a, uint64_t b,
               std::source_location where = std::source_location::current()) {
  static_assert(N == 64 || N == 128 || N == 256);
  cuda_on_cpu::Thread& me = *cuda_on_cpu::current_thread;
  if (a >> 62 != 1 || b >> 62 != 1) cuda_on_cpu::fail("wgmma: descriptors must name the 128-byte swizzle");
  if (!me.products.fenced) cuda_on_cpu::fail("wgmma without a wgmma_fence before");
  const uint64_t mine[2] = {a, b};
  const auto& all = cuda_on_cpu::meet(~0u, {"wgmma", where}, cuda_on_cpu::Orders::nothing, mine, sizeof mine);
  if (std::memcmp(all.bytes[0], mine, sizeof mine) != 0)
    cuda_on_cpu::fail("wgmma: descriptors differ between lanes");

  const int first_row = me.warp % 4 * 16 + me.lane / 4, first_col = me.lane % 4 * 2;
  me.products.start(d, N / 2, [=](float* sums) {
    float row[16], rows[16][2], col[16], products[2];
    for (int h = 0; h < 2; ++h) {
      load_wgmma_row(row, a, first_row + 8 * h);
      for (int k = 0; k < 16; ++k) rows[k][h] = row[k];
    }
    for (int j = 0; j < N / 8; ++j)
      for (int c = 0; c < 2; ++c) {
        load_wgmma_row(col, b, 8 * j + first_col + c);
        cuda_on_cpu::sum_products(products, col, rows);
        for (int h = 0; h < 2; ++h) {
          float& sum = sums[4 * j + 2 * h + c];
          sum = cuda_on_cpu::plus_products(sum, products[h]);
        }
      }
  });
}

#endif

/// A tile as tma_load leaves it, for wgmma_k16: its address, and 1024 bytes from one group of 8 rows to the
/// next, in units of 16 bytes; the swizzle. Add 2 (32 bytes) for the next 16 columns.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* tile) {
  const uint64_t address = (shared_address(tile) & 0x3ffff) >> 4, group = 1024 >> 4, swizzle_128_bytes = 1;
  return address | uint64_t{1} << 16 | group << 32 | swizzle_128_bytes << 62;
}
