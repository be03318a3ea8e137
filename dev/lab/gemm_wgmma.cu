#include "dev/lab/gemm_wgmma.h"

#include "model/kernels/cuda.h"
#include "model/kernels/hopper.h"

namespace {
constexpr int kTileM = 128, kStepK = 64, kStages = 4;
constexpr int kConsumers = 2 * 128,
              kThreads = kConsumers + kWarpSize;  // two warpgroups and the producer's warp
// Tiles that run at the same time share columns of b in the L2 cache. (Unused where HOPPER_CODE is 0.)
[[maybe_unused]] constexpr int kTilesPerColumn = 16;

/// One stage of the ring: 64 columns of both operands, as TMA leaves them (hopper.h).
template <int kTileN>
struct Stage {
  bf16 a[kTileM * kStepK], b[kTileN * kStepK];
};
template <int kTileN>
constexpr int kSharedBytes = kStages* static_cast<int>(sizeof(Stage<kTileN>)) + 2 * kStages * 8;

struct Product {
  int64_t M, N, K;
  float alpha, beta;
};

/// The tile of this block: down a column of kTilesPerColumn tiles, then the next column.
template <int kTileN>
__device__ __forceinline__ void find_tile(const Product& p, int& row, int& col) {
  const int rows = static_cast<int>((p.M + kTileM - 1) / kTileM),
            cols = static_cast<int>((p.N + kTileN - 1) / kTileN);
  const int band = static_cast<int>(blockIdx.x) / (kTilesPerColumn * cols) * kTilesPerColumn;
  const int height = min(kTilesPerColumn, rows - band);
  const int in_band = static_cast<int>(blockIdx.x) - band * cols;
  row = (band + in_band % height) * kTileM;
  col = in_band / height * kTileN;
}

/// Fills the stages as they become empty.
template <int kTileN>
__device__ void produce(Stage<kTileN>* stages, uint64_t* full, uint64_t* empty, const TensorMap& a,
                        const TensorMap& b, int row, int col, int steps) {
  for (int k = 0; k < steps; ++k) {
    const int s = k % kStages, parity = k / kStages % 2;
    mbarrier_wait(&empty[s], 1 - parity);
    mbarrier_arrive_expect(&full[s], sizeof(Stage<kTileN>));
    tma_load(stages[s].a, a, &full[s], row, k * kStepK);
    tma_load(stages[s].b, b, &full[s], col, k * kStepK);
  }
}

/// Sums up 64 rows of the tile, those of the caller's warpgroup.
template <int kTileN>
__device__ __forceinline__ void consume(float (&sums)[kTileN / 2], Stage<kTileN>* stages, uint64_t* full,
                                        uint64_t* empty, int steps) {
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  for (int k = 0; k < steps; ++k) {
    const int s = k % kStages, parity = k / kStages % 2;
    mbarrier_wait(&full[s], parity);
    const uint64_t a = wgmma_descriptor(stages[s].a + warpgroup * 64 * kStepK),
                   b = wgmma_descriptor(stages[s].b);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kStepK / 16; ++i) wgmma_k16<kTileN>(sums, a + 2 * i, b + 2 * i);
    wgmma_commit();
    // The products of this stage go on; those of the stage before are done, and it may be filled again.
    wgmma_wait<1>();
    if (k > 0 && threadIdx.x % 128 == 0) mbarrier_arrive(&empty[(k - 1) % kStages]);
  }
  wgmma_wait<0>();
}

/// Two neighbours of a row: c = alpha sum + bias + beta c.
template <typename T>
__device__ __forceinline__ void store_pair(T* c, const T* bias, const Product& p, int64_t row, int64_t col,
                                           float first, float second) {
  if (row >= p.M) return;
  const float sums[2] = {first, second};
  T* to = c + row * p.N + col;
  Pack<T, 2> pair;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (col + i >= p.N) continue;
    float value = p.alpha * sums[i];
    if (bias != nullptr) value += to_float(bias[col + i]);
    if (p.beta != 0) value += p.beta * to_float(to[i]);
    pair.v[i] = from_float<T>(value);
  }
  if (p.N % 2 == 0 && col < p.N) {
    store<T, 2>(to, pair);
  } else {
    if (col < p.N) to[0] = pair.v[0];
    if (col + 1 < p.N) to[1] = pair.v[1];
  }
}

template <typename T, int kTileN>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_kernel(T* c, const T* bias, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                const Product p) {
#if HOPPER_CODE
  DYN_SHARED(Stage<kTileN>, stages);
  auto* full = reinterpret_cast<uint64_t*>(stages + kStages);
  uint64_t* empty = full + kStages;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(&full[s], 1);                  // the producer, and the bytes that it announces
      mbarrier_init(&empty[s], kConsumers / 128);  // one thread per warpgroup
    }
    mbarrier_fence_init();
  }
  __syncthreads();

  int row, col;
  find_tile<kTileN>(p, row, col);
  const int steps = static_cast<int>((p.K + kStepK - 1) / kStepK);
  if (threadIdx.x >= kConsumers) {
    if (threadIdx.x == kConsumers) produce(stages, full, empty, a, b, row, col, steps);
    return;
  }
  float sums[kTileN / 2] = {};
  consume<kTileN>(sums, stages, full, empty, steps);

  const int warp = static_cast<int>(threadIdx.x) / kWarpSize,
            lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t my_row = row + warp * 16 + lane / 4, my_col = col + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < kTileN / 8; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      store_pair(c, bias, p, my_row + 8 * h, my_col + 8 * j, sums[4 * j + 2 * h], sums[4 * j + 2 * h + 1]);
#endif
}

template <typename T, int kTileN>
void launch_gemm(Context& ctx, const Matmul& args, const Product& p) {
  const bf16 *a = data_of<bf16>(args.a), *b = data_of<bf16>(args.b);
  const int64_t tiles = ((p.M + kTileM - 1) / kTileM) * ((p.N + kTileN - 1) / kTileN);
  launch(ctx, {.grid = static_cast<unsigned>(tiles), .block = kThreads, .shared = kSharedBytes<kTileN>},
         gemm_kernel<T, kTileN>, data_of<T>(args.c), data_of<T>(args.bias), tensor_map(a, p.M, p.K, kTileM),
         tensor_map(b, p.N, p.K, kTileN), p);
}
}  // namespace

void lab_gemm_wgmma(Context& ctx, const Matmul& args) {
  check(args);
  const Product p{args.c.rows(), args.c.cols(), args.a.cols(), args.alpha, args.beta};
  if (args.transpose_a || !args.transpose_b || args.pre_gelu || args.gelu_input || args.dbias || p.K % 8 != 0)
    throw ShapeError("lab_gemm_wgmma: only c = a b^T (+ bias), K a multiple of 8");
  for_float_type(args.c.dtype, [&]<typename T>(T) {
    // Wide tiles read less of both operands; they pay when there are enough of them.
    if (p.N % 256 == 0)
      launch_gemm<T, 256>(ctx, args, p);
    else
      launch_gemm<T, 128>(ctx, args, p);
  });
}
