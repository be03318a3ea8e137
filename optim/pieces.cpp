#include "optim/pieces.h"

#include <cstring>

#include "model/kernels/simd.h"
#include "optim/update.h"

namespace {
/// One dimension: `count` stretches of `length` from `start`.
struct Stretch {
  int64_t start, length, count;
};
std::vector<Stretch> stretches(int64_t n, int64_t side) {
  if (side == 0 || n <= side) return {{0, n, 1}};
  const int64_t full = n / side, rest = n % side;
  std::vector<Stretch> list{{0, side, full}};
  if (rest > 0) list.push_back({full * side, rest, 1});
  return list;
}

/// Calls copy(row of a piece, where it lies in the matrix, bytes) for every row of every piece.
template <typename Copy>
void for_each_row(Context& ctx, const Pieces& args, Copy&& copy) {
  const PieceGrid& g = args.grid;
  const int64_t size = dtype_bytes(args.whole.dtype), width = args.whole.shape[1];
  auto* parts = static_cast<std::byte*>(args.parts.data);
  auto* whole = static_cast<std::byte*>(args.whole.data);
  deal_out(ctx, g.count() * g.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t piece = k / g.rows, r = k % g.rows;
      const int64_t row = g.row + piece / g.J * g.rows + r, col = g.col + piece % g.J * g.cols;
      copy(parts + k * g.cols * size, whole + (row * width + col) * size, static_cast<size_t>(g.cols * size));
    }
  });
}
}  // namespace

std::vector<PieceGrid> pieces_of(const Shape& matrix, int64_t side) {
  std::vector<PieceGrid> grids;
  for (const Stretch& down : stretches(matrix[0], side))
    for (const Stretch& across : stretches(matrix[1], side))
      grids.push_back({.row = down.start,
                       .col = across.start,
                       .rows = down.length,
                       .cols = across.length,
                       .I = down.count,
                       .J = across.count});
  return grids;
}

void check(const Pieces& args) {
  const PieceGrid& g = args.grid;
  expect_shape(args.parts, {g.count(), g.rows, g.cols}, "pieces: parts");
  expect(args.parts.dtype == args.whole.dtype, "pieces: parts need the dtype of the matrix");
  expect(args.whole.shape.rank() == 2 && g.row >= 0 && g.col >= 0 &&
             g.row + g.I * g.rows <= args.whole.shape[0] && g.col + g.J * g.cols <= args.whole.shape[1],
         "pieces: the grid leaves the matrix");
}

void cpu::cut_pieces(Context& ctx, const Pieces& args) {
  for_each_row(ctx, args,
               [](std::byte* part, const std::byte* whole, size_t n) { std::memcpy(part, whole, n); });
}

void cpu::paste_pieces(Context& ctx, const Pieces& args) {
  for_each_row(ctx, args,
               [](const std::byte* part, std::byte* whole, size_t n) { std::memcpy(whole, part, n); });
}

namespace {
bool is_whole(const Tensor& matrix, const PieceGrid& grid) {
  return matrix.shape == Shape{grid.rows, grid.cols};
}
}  // namespace

// Whole matrices go in one launch.
void gather_pieces(Context& ctx, const Tensor& parts, std::span<const Tensor> matrices,
                   const PieceGrid& grid) {
  std::vector<Smooth> copies;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Tensor to = parts.slice(static_cast<int64_t>(i) * grid.count(), grid.count());
    if (is_whole(matrices[i], grid))
      copies.push_back({.u = to, .g = matrices[i]});
    else
      cut_pieces(ctx, {.parts = to, .whole = matrices[i], .grid = grid});
  }
  if (!copies.empty()) smooth(ctx, copies);
}

void scatter_pieces(Context& ctx, const Tensor& parts, std::span<const Tensor> matrices,
                    const PieceGrid& grid) {
  std::vector<Smooth> copies;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Tensor from = parts.slice(static_cast<int64_t>(i) * grid.count(), grid.count());
    if (is_whole(matrices[i], grid))
      copies.push_back({.u = matrices[i], .g = from});
    else
      paste_pieces(ctx, {.parts = from, .whole = matrices[i], .grid = grid});
  }
  if (!copies.empty()) smooth(ctx, copies);
}
