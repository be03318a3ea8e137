// A matrix in pieces: rules whose work grows with the cube of a side (shampoo) cut large matrices up, and
// treat every piece as a matrix of its own.
//
//   pieces_of(shape, side)   how to cut (R, C) into pieces of at most side x side
//   cut_pieces               parts[i J + j][r][c] = whole[row + i rows + r][col + j cols + c]
//   paste_pieces             the way back
//   gather_pieces            cut_pieces of several matrices into one batch, matrix after matrix
//   scatter_pieces           the way back
//
// Pieces begin at the upper left corner and are as large as allowed, so that those at the right and lower
// edge may be smaller. Pieces of one size form a grid; a matrix has one to four grids, which cover it exactly
// once. f32 or f64. Nothing overlaps. Copies of bits.
#pragma once

#include <span>
#include <vector>

#include "model/kernels/context.h"

/// I x J pieces (rows, cols) side by side, the first one at (row, col) of the matrix.
struct PieceGrid {
  int64_t row = 0, col = 0;    // where the grid begins
  int64_t rows = 0, cols = 0;  // of a piece
  int64_t I = 1, J = 1;        // pieces below one another, and side by side
  int64_t count() const { return I * J; }
};

/// `side` 0: the whole matrix is one piece.
std::vector<PieceGrid> pieces_of(const Shape& matrix, int64_t side);

struct Pieces {
  Tensor parts;    // (I J, rows, cols)
  Tensor whole;    // (R, C)
  PieceGrid grid;  // within whole
};

namespace cpu {
void cut_pieces(Context& ctx, const Pieces& args);
void paste_pieces(Context& ctx, const Pieces& args);
}  // namespace cpu
namespace gpu {
void cut_pieces(Context& ctx, const Pieces& args);
void paste_pieces(Context& ctx, const Pieces& args);
}  // namespace gpu

inline Work work(const Pieces& args) {
  return {.bytes = 2.0 * static_cast<double>(args.parts.bytes())};
}

/// Throws ShapeError unless the parts fit the grid, and the grid the matrix.
void check(const Pieces& args);

inline void cut_pieces(Context& ctx, const Pieces& args) {
  check(args);
  ON_DEVICE(cut_pieces, ctx, args);
}
inline void paste_pieces(Context& ctx, const Pieces& args) {
  check(args);
  ON_DEVICE(paste_pieces, ctx, args);
}

/// parts (matrices I J, rows, cols)
void gather_pieces(Context& ctx, const Tensor& parts, std::span<const Tensor> matrices,
                   const PieceGrid& grid);
void scatter_pieces(Context& ctx, const Tensor& parts, std::span<const Tensor> matrices,
                    const PieceGrid& grid);
