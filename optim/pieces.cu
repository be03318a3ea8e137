#include "optim/pieces.h"

#include "model/kernels/cuda.h"

namespace {
constexpr int kThreads = 128;

/// One block for each row of each piece.
template <typename T, bool kPaste>
__global__ void __launch_bounds__(kThreads) pieces_kernel(T* parts, T* whole, PieceGrid g, int64_t width) {
  const int64_t k = blockIdx.x, piece = k / g.rows;
  const int64_t row = g.row + piece / g.J * g.rows + k % g.rows, col = g.col + piece % g.J * g.cols;
  T* part = parts + k * g.cols;
  T* there = whole + row * width + col;
  for (int64_t c = threadIdx.x; c < g.cols; c += kThreads) {
    if constexpr (kPaste)
      there[c] = part[c];
    else
      part[c] = there[c];
  }
}

template <bool kPaste>
void copy(Context& ctx, const Pieces& args) {
  const PieceGrid& g = args.grid;
  const Launch shape{.grid = static_cast<unsigned>(g.count() * g.rows), .block = kThreads};
  const int64_t width = args.whole.shape[1];
  if (args.whole.dtype == DType::f64)
    launch(ctx, shape, pieces_kernel<double, kPaste>, args.parts.f64(), args.whole.f64(), g, width);
  else
    launch(ctx, shape, pieces_kernel<float, kPaste>, args.parts.f32(), args.whole.f32(), g, width);
}
}  // namespace

void gpu::cut_pieces(Context& ctx, const Pieces& args) {
  copy<false>(ctx, args);
}
void gpu::paste_pieces(Context& ctx, const Pieces& args) {
  copy<true>(ctx, args);
}
