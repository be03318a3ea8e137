#include "optim/unit_lines.h"

#include "model/kernels/multiplier.h"
#include "optim/move.cuh"

// Memory-bound: norms first (reduce.cu), then every element once, a pack of one row per thread.

namespace {
constexpr int kThreads = 256;

template <typename T>
struct UnitTask {
  T* u;
  const T *g, *norms;  // of the lines
  int64_t packs, cols;
  T factor;
  bool by_rows;
  const float* guard;
  Target<T> into;
};

/// N elements per thread, all in one row: N > 1 divides cols.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) unit_lines_kernel(const __grid_constant__ UnitTask<T> a) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= a.packs || is_nan(read_scale(a.guard))) return;
  const int64_t i = index * N, row = i / a.cols, col = i - row * a.cols;
  Pack<T, N> u = load<T, N>(a.g + i);
  const Pack<T, N> w = load_weights<N>(a.into, i);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const Multiplier<T> by = multiplier(a.norms[a.by_rows ? row : col + k], a.factor, /*divide=*/true);
    u.v[k] = u.v[k] * by.lift * by.scale;
  }
  if (a.u != nullptr) store<T, N>(a.u + i, u);
  move<N>(a.into, i, w, u);
}

template <typename T>
void unit_lines_of(Context& ctx, const UnitLines& args, const Tensor& norms) {
  UnitTask<T> task{.u = data_of<T>(args.u),
                   .g = data_of<T>(args.g),
                   .norms = data_of<T>(norms),
                   .packs = args.g.size(),
                   .cols = args.g.cols(),
                   .factor = static_cast<T>(args.factor),
                   .by_rows = args.lines == Lines::rows,
                   .guard = data_of<float>(args.into.guard),
                   .into = target_of<T>(args.into)};
  constexpr int N = kPackSize<T>;
  const bool wide = can_vectorize<T>(task.cols, task.u, task.g, task.into.w, task.into.copy);
  if (wide) task.packs /= N;
  launch(ctx, {.grid = blocks_for(task.packs, kThreads), .block = kThreads},
         wide ? unit_lines_kernel<T, N> : unit_lines_kernel<T, 1>, task);
}
}  // namespace

void gpu::unit_lines(Context& ctx, const UnitLines& args) {
  const bool by_rows = args.lines == Lines::rows;
  Scratch::Frame frame(ctx.scratch);
  Tensor norms = args.norms;
  if (!norms) {
    norms = frame.tensor({by_rows ? args.g.rows() : args.g.cols()}, args.g.dtype);
    if (by_rows)
      gpu::row_norms(ctx, {.norms = norms, .x = args.g});
    else
      gpu::col_norms(ctx, {.norms = norms, .x = args.g});
  }
  if (args.g.dtype == DType::f64) return unit_lines_of<double>(ctx, args, norms);
  unit_lines_of<float>(ctx, args, norms);
}
