// Matrices cut into pieces and put together again, on the CPU and on a GPU or in the executor.
#include "optim/pieces.h"

#include <gtest/gtest.h>

#include "tests/shampoo_fixture.h"

TEST(Pieces, CoverTheMatrixOnce) {
  in_both_dtypes([](auto number, UseDevice use) {
    using T = typename decltype(number)::type;
    Context ctx;
    use(ctx);
    for (const auto& [rows, cols, side] :
         {std::tuple<int64_t, int64_t, int64_t>{7, 10, 3}, {8, 8, 4}, {1, 9, 4}, {5, 150, 130}, {3, 4, 0}}) {
      const MatrixOf<T> x = as<T>(normal(rows, cols, 5));
      ThereOf<T> from(ctx, x), to(ctx, MatrixOf<T>(rows, cols)), parts(ctx, MatrixOf<T>(rows, cols));
      int64_t covered = 0;
      for (const PieceGrid& grid : pieces_of({rows, cols}, side)) {
        EXPECT_TRUE(side == 0 || std::max(grid.rows, grid.cols) <= side);
        const int64_t size = grid.count() * grid.rows * grid.cols;
        const Tensor part =
            parts.tensor().view({rows * cols}).slice(0, size).view({grid.count(), grid.rows, grid.cols});
        cut_pieces(ctx, {.parts = part, .whole = from.tensor(), .grid = grid});
        const MatrixOf<T> here = download<T>(ctx, part);
        for (int64_t k = 0; k < size; ++k) {
          const int64_t c = k % grid.cols, r = k / grid.cols % grid.rows, piece = k / (grid.rows * grid.cols);
          EXPECT_EQ(here.data[static_cast<size_t>(k)],
                    x(grid.row + piece / grid.J * grid.rows + r, grid.col + piece % grid.J * grid.cols + c));
        }
        paste_pieces(ctx, {.parts = part, .whole = to.tensor(), .grid = grid});
        covered += size;
      }
      EXPECT_EQ(covered, rows * cols);
      EXPECT_EQ(to.here().data, x.data);
    }
    ThereOf<T> small(ctx, MatrixOf<T>(2, 2));
    EXPECT_THROW(
        cut_pieces(
            ctx, {.parts = small.batch(), .whole = small.tensor(), .grid = {.row = 1, .rows = 2, .cols = 2}}),
        ShapeError);
  });
}
