#include "model/kernels/cross_entropy.h"

#include <cmath>

#include "model/kernels/fast_math.h"
#include "model/kernels/packs.cuh"

// A block per row. First pass: maximum and sum of exponentials together; second pass: the gradient. Between
// the two the row waits in shared memory (kKept), if it fits, so that memory sees one reading and one
// writing. Every thread meets only its own values again, so the passes need no barrier but those of the
// reductions.

namespace {
/// Bytes of a row that the shared memory of one block can hold, besides the few of the reductions.
int64_t most_kept(int compute_capability) {
  const int kib = compute_capability >= 90 && compute_capability < 120   ? 227
                  : compute_capability == 80 || compute_capability == 87 ? 163
                                                                         : 99;
  return kib * 1024 - 1024;
}

constexpr float kLog2E = 1.44269504f;

/// e^x, relative error below 3e-7 + 6e-8 |x|. exp and expf cost more than hides behind the memory traffic.
__device__ __forceinline__ float fast_exp(float x) {
  return fast_exp2(kLog2E * x);
}

/// e^(x - shift) of many x, relative error below 3e-7 + 6e-8 (|x| + |shift|), in two instructions each: these
/// exponentials are most of what the kernel computes, and that must hide, too.
struct ShiftedExp {
  float minus_shift;  // in powers of two
  __device__ __forceinline__ explicit ShiftedExp(float shift) : minus_shift(-kLog2E * shift) {}
  __device__ __forceinline__ float operator()(float x) const {
    return fast_exp2(fmaf(x, kLog2E, minus_shift));
  }
};

/// The largest value seen so far, and the sum of exp(x - largest).
struct Softmax {
  float largest = -INFINITY, sum = 0;

  /// What is subtracted before exponentials are taken. While all values are -inf any number will do, except
  /// -inf, whose difference with itself is NaN.
  __device__ __forceinline__ float shift() const { return largest == -INFINITY ? 0.0f : largest; }

  /// A NaN is passed over by the maximum and reappears in the sum.
  template <int P>
  __device__ __forceinline__ void add(const Floats<P>& x) {
    float m = x.v[0];
#pragma unroll
    for (int k = 1; k < P; ++k) m = fmaxf(m, x.v[k]);
    if (m > largest) {
      sum *= fast_exp(largest - m);  // at first: 0 * 0
      largest = m;
    }
    const ShiftedExp shifted_exp(shift());
#pragma unroll
    for (int k = 0; k < P; ++k) sum += shifted_exp(x.v[k]);
  }

  /// Makes the sums of all threads of a block into one that all have. `shared`: a float per warp.
  __device__ __forceinline__ void combine(float* shared) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const float of_warp = warp_max(largest);
    if (threadIdx.x % kWarpSize == 0) shared[warp] = of_warp;
    __syncthreads();
    float of_block = shared[0];
    for (int i = 1; i < static_cast<int>(blockDim.x) / kWarpSize; ++i) of_block = fmaxf(of_block, shared[i]);
    __syncthreads();
    if (largest < of_block) sum *= fast_exp(largest - of_block);
    largest = of_block;
    sum = block_sum(sum, shared);
  }
};

struct Rows {
  float* losses;
  const int32_t* targets;
  int64_t V, Vp;
  float grad_scale;
  bool with_gradient;
};

/// A column's gradient, scale (softmax - [v = target]), where `factor` is scale / sum of exponentials.
struct Gradient {
  ShiftedExp shifted_exp;
  float factor, scale;
  int target;
  template <int P>
  __device__ __forceinline__ Floats<P> operator()(const Floats<P>& x, int v) const {
    Floats<P> gradient;
#pragma unroll
    for (int k = 0; k < P; ++k) gradient.v[k] = factor * shifted_exp(x.v[k]);
    if (target >= v && target - v < P) {  // rare; inside, indices stay compile-time constants
#pragma unroll
      for (int k = 0; k < P; ++k)
        if (v + k == target) gradient.v[k] -= scale;
    }
    return gradient;
  }
};

// Two blocks of 512 threads, with a row of 100 KB each, fill a multiprocessor's shared memory.
template <typename T, int P, bool kKept>
__global__ void __launch_bounds__(512) cross_entropy_kernel(T* logits, const Rows p) {
  constexpr int kBatch = 4;  // loads in flight per thread
  DYN_SHARED(T, kept);       // V
  __shared__ float shared[512 / kWarpSize];
  // Places in a row are ints: with 64 bits, they would cost as much as the exponentials.
  const int V = static_cast<int>(p.V), threads = static_cast<int>(blockDim.x), packs = V / P;
  T* const row = logits + int64_t{blockIdx.x} * p.Vp;
  const int target = p.targets[blockIdx.x];
  const bool legal = target >= 0 && target < V;

  Softmax softmax;
  const int mine = static_cast<int>(threadIdx.x), step = threads * P;
  const T* from = row + mine * P;
  T* to = kept + (kKept ? mine * P : 0);
  for (int i = mine; i < packs; i += kBatch * threads) {
    Pack<T, P> batch[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (i + b * threads < packs)
        batch[b] = kKept ? load_streaming<T, P>(from + b * step) : load<T, P>(from + b * step);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (i + b * threads >= packs) continue;
      if constexpr (kKept) store<T, P>(to + b * step, batch[b]);
      softmax.add(to_floats(batch[b]));
    }
    from += kBatch * step;
    if constexpr (kKept) to += kBatch * step;
  }
  const int rest = packs * P + mine;  // fewer than P columns, one by one
  if (rest < V) softmax.add(load_floats<1>(row + rest));
  const float last = rest < V ? to_float(row[rest]) : 0.0f;
  // Before the barriers of combine, behind which the gradient overwrites it; and not before the row is read,
  // which would have to wait for the target.
  const float of_target = threadIdx.x == 0 && legal ? to_float(row[target]) : NAN;
  softmax.combine(shared);
  if (threadIdx.x == 0) p.losses[blockIdx.x] = (softmax.largest - of_target) + logf(softmax.sum);
  if (!p.with_gradient) return;

  const float scale = legal ? p.grad_scale : 0.0f;
  const Gradient gradient{ShiftedExp(softmax.shift()), legal ? scale / softmax.sum : 0.0f, scale, target};
  for (int i = mine; i < packs; i += threads)
    store_floats<P>(row + i * P, gradient(load_floats<P>((kKept ? kept : row) + i * P), i * P));
  if (rest < V) store_floats<1>(row + rest, gradient(Floats<1>{{last}}, rest));
  for (int64_t v = V + mine; v < p.Vp; v += threads) row[v] = from_float<T>(0);
}
}  // namespace

void gpu::cross_entropy(Context& ctx, const CrossEntropy& args) {
  const Rows p{.losses = args.losses.f32(),
               .targets = args.targets.i32(),
               .V = args.V,
               .Vp = args.logits.cols(),
               .grad_scale = args.grad_scale,
               .with_gradient = args.with_gradient};
  for_float_type(args.logits.dtype, [&]<typename T>(T) {
    T* logits = data_of<T>(args.logits);
    Launch how{.grid = static_cast<unsigned>(args.logits.rows()), .block = p.V > 4096 ? 512u : 128u};
    const int64_t bytes = p.V * int64_t{sizeof(T)};
    by_width<T>(can_vectorize<T>(p.Vp, logits), [&](auto P) {
      if (!p.with_gradient || bytes > most_kept(ctx.device->compute_capability))
        return launch(ctx, how, cross_entropy_kernel<T, P(), false>, logits, p);
      how.shared = static_cast<size_t>(bytes);
      launch(ctx, how, cross_entropy_kernel<T, P(), true>, logits, p);
    });
  });
}
