// What shampoo and oneside keep: how matrices are cut, where the factors of a piece lie in state, and
// scratch.
#include <algorithm>

#include "model/kernels/reduce.h"
#include "optim/at_once.h"
#include "optim/shampoo.h"

/// How a matrix is cut: by what a root of its sides would cost, so a side without a factor does not count.
std::vector<PieceGrid> Shampoo::grids_of(const Shape& matrix) const {
  const bool fits = !both_ && std::min(matrix[0], matrix[1]) <= block_;
  return pieces_of(matrix, fits ? 0 : block_);
}

int64_t Shampoo::largest_side(const PieceGrid& grid) const {
  int64_t n = 0;
  for (const Side side : kSides)
    if (has(side, grid)) n = std::max(n, side_length(side, grid.rows, grid.cols));
  return n;
}

std::vector<StateSpec> Shampoo::state_of_shape(const Shape& block) const {
  std::vector<StateSpec> specs = smoothing_.state(block);
  if (graft_.keeps_v()) specs.push_back({.name = "v", .shape = block});
  if (alone()) return specs;
  const std::vector<PieceGrid> grids = grids_of(block);
  for (const char* suffix : {"", kRootSuffix}) {
    if (suffix == kRootSuffix && !keeps_roots()) break;
    for (const Side side : kSides) {
      int64_t size = 0, n = 0;
      for (const PieceGrid& grid : grids)
        if (has(side, grid)) n = side_length(side, grid.rows, grid.cols), size += grid.count() * n * n;
      if (size == 0) continue;
      specs.push_back(
          {.name = factor_name(side) + suffix, .shape = size == n * n ? Shape{n, n} : Shape{size}});
    }
  }
  return specs;
}

/// For a side of n and another of m: a Gram matrix and a product, 4 n^2 m; now and then a root, 10 n^3 by
/// eigen, 8 n^3 a step by newton.
double Shampoo::work(const Group& group) const {
  double sum = Rule::work(group);
  const double root = (root_ == RootMethod::eigen ? 10 : 8.0 * steps_) / static_cast<double>(freq_);
  for (const PieceGrid& grid : grids_of(group.shape))
    for (const Side side : kSides) {
      if (!has(side, grid)) continue;
      const auto n = static_cast<double>(side_length(side, grid.rows, grid.cols));
      const auto size = static_cast<double>(grid.rows * grid.cols), count = static_cast<double>(grid.count());
      sum += count * (4 * n * size + root * n * n * n);
    }
  return sum;
}

Tensor Shampoo::state_of(const Block& block, const std::string& name) const {
  const std::vector<StateSpec> specs = state_of_shape(block.grad.shape);
  const auto found = std::ranges::find(specs, name, &StateSpec::name);
  return block.state[static_cast<size_t>(found - specs.begin())];
}

/// L or R of the batch's pieces of one block, or with a suffix their roots: (pieces, n, n).
Tensor Shampoo::factor(const Batch& batch, size_t block, Side side, const char* suffix) const {
  const Tensor all = state_of(batch.blocks[block], factor_name(side) + suffix);
  const int64_t n = side_length(side, batch.grid.rows, batch.grid.cols), count = batch.grid.count();
  return all.view({all.size()})
      .slice(batch.start[static_cast<size_t>(side)], count * n * n)
      .view({count, n, n});
}

/// What for_each_batch() and the operations in it take for a batch of so many pieces.
int64_t Shampoo::batch_bytes(const Context& ctx, const PieceGrid& grid, int64_t pieces, DType of) const {
  const int64_t n = largest_side(grid), size = grid.rows * grid.cols;
  const DType dtype = wide(of) ? DType::f64 : of;
  return (wide(of) ? dtype_bytes(of) * pieces * size : 0) +
         dtype_bytes(dtype) * pieces * (2 * size + n * n + 2) +
         std::max({inverse_root_scratch_bytes(ctx, {pieces, n, n}, dtype, root_),
                   row_norms_scratch_bytes(pieces, size), bound_scratch_bytes(pieces, size),
                   whole_scratch_bytes()});
}

/// How many blocks are taken together: at least one for each thread where LAPACK takes the roots.
int64_t Shampoo::at_once_of(const Context& ctx, const Group& group) const {
  int64_t bytes = 0;
  for (const PieceGrid& grid : grids_of(group.shape))
    bytes = std::max(bytes, batch_bytes(ctx, grid, grid.count(), group.dtype));
  return at_once(ctx, bytes, static_cast<int64_t>(group.blocks.size()),
                 root_ == RootMethod::eigen ? ctx.threads : 1);
}

int64_t Shampoo::scratch_bytes(const Context& ctx, const Group& group) const {
  const int64_t blocks = at_once_of(ctx, group);
  int64_t bytes = whole_scratch_bytes();
  for (const PieceGrid& grid : grids_of(group.shape))
    bytes = std::max(bytes, batch_bytes(ctx, grid, blocks * grid.count(), group.dtype));
  return bytes + (!graft_.none() ? blocks * dtype_bytes(group.dtype) * group.shape.size() : 0);
}
