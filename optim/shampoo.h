// shampoo and oneside: the gradient between roots of its own second moments.
//
//   L = G G^T, R = G^T G, kept over time:
//     accumulate=ema    L <- beta L + (1 - beta) G G^T, divided by 1 - beta^t (bias_correction=0: not)
//     accumulate=sum    L <- L + G G^T
//     accumulate=none   of this step alone, and of M in the place of G
//   M: the smoothed gradient (momentum, nesterov, ema: Smoothing), with bias_correction a true mean
//   sides=both   u = (L + eps I)^exponent M (R + eps I)^exponent                   exponent -1/4
//   sides=one    u = (L + eps I)^exponent M, or M (R + eps I)^exponent when there are fewer columns; -1/2
//   graft        u takes the length of another direction: adam's (the default), adagrad's or sgd's (graft.h)
//
// Gupta, Koren & Singer, arXiv 1802.09568; equations 12-14 of arXiv 2409.20325, and 15-16: with
// accumulate=none u is U V^T, the dual vector under l2-l2, also of a gradient of any size or rank, so that
// shampoo:accumulate=none,momentum=0,graft=none is spectral:ns=svd. exponent=-0.5 on both sides is Shampoo^2
// (Morwani et al., arXiv 2406.17748), U S^-1 V^T without accumulation.
//
// eps is absolute, in units of G^2: where the eigenvalues of L and R are below it the roots are those of eps,
// and u shrinks with G (grafting gives it its size back). 0 takes pseudo-inverses (root=eigen), which leave
// out what is below 1e-6 of the largest eigenvalue (f32; inverse_root.h). For accumulate=none eps is relative
// to ||M||_F^2. A G beyond 1e18 (f32) enters L and R at that size; one below 1e-22 has no squares, so that L
// and R are zero and u, too, where eps is 0 (but for accumulate=none).
//
// root=eigen is exact and runs on the host, so that a GPU waits; root=newton is made of products: an exponent
// -1/p, `steps` iterations. The roots are renewed at step 1 and every `freq` steps after it; in between they
// are state. For sum and ema that is the price: at a side of n about 10 n^3 operations in float64 by eigen.
//
// Sides beyond `block` are cut into blocks of at most block x block (pieces.h), each of which is a matrix of
// its own, in grafting too; 0: never; nor with sides=one where the smaller side is not beyond it. State of a
// matrix that is not cut: L (rows, rows), R (cols, cols), and the same for the roots unless freq=1; of one
// that is, those of all pieces in a row.
//
// Defaults: shampoo as modded-nanogpt ran it at 124M parameters (mean of 0.9, beta 0.95, Adam's size, every
// 10 steps); oneside as R. Anil's entry there: one side, pseudo-inverse, every step, means of 0.9.
//
// Asked for a dual norm it reports <M, u>: exact for accumulate=none without grafting, else what the step
// achieves to first order.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "optim/graft.h"
#include "optim/inverse_root.h"
#include "optim/kronecker.h"
#include "optim/pieces.h"
#include "optim/rule.h"

class Shampoo final : public Rule {
 public:
  /// Where shampoo and oneside differ.
  struct Defaults {
    double lr, wd;
    const char* sides;
    double beta, eps, graft_beta2;
    int64_t freq;
  };

  Shampoo(Keyed& keys, const Defaults& defaults);

  Norm norm() const override { return {NormKind::l2_l2}; }
  std::string describe() const override {
    if (alone()) return "l2-l2";
    return both_ ? "l2-l2, smoothed by L and R" : "l2-l2, smoothed by L or R";
  }
  bool matrices_only() const override { return true; }
  bool waits() const override { return root_ == RootMethod::eigen; }

  std::vector<StateSpec> state(const Group& group) const override { return state_of_shape(group.shape); }
  double work(const Group& group) const override;
  int64_t scratch_bytes(const Context& ctx, const Group& group) const override;
  Measured direction(Context& ctx, Group& group, const RuleStep& step) const override;

 private:
  using Blocks = std::span<const Block>;
  /// The pieces of one size of some blocks, and scratch for them.
  struct Batch {
    Blocks blocks;
    PieceGrid grid;
    int64_t start[2];  // by side: where their factors begin in the tensors of state
    Tensor x, y;       // (pieces, rows, cols), f64 where wide()
    Tensor factors;    // room for (pieces, n, n)
    Tensor narrow;     // as x, in the dtype of the gradients; absent where x is
    int64_t pieces() const { return static_cast<int64_t>(blocks.size()) * grid.count(); }
    /// Whether the only piece of a block is the block.
    bool whole() const { return blocks[0].grad.shape == Shape{grid.rows, grid.cols}; }
    /// The pieces of block i among all.
    Tensor of_block(const Tensor& all, size_t i) const {
      return all.slice(static_cast<int64_t>(i) * grid.count(), grid.count());
    }
  };

  std::vector<StateSpec> state_of_shape(const Shape& block) const;
  void read_root(Keyed& keys);
  void gather(Context& ctx, const Batch& batch, const Tensor& to, std::span<const Tensor> from) const;
  static constexpr const char* kRootSuffix = "_root";  // of the name of a factor's tensor

  bool alone() const { return accumulate_ == "none"; }
  /// Without accumulation the roots belong to a single gradient, whose smallest singular values a Gram matrix
  /// in float32 would lose: their squares. On the host anyway, it is float64 then.
  bool wide(DType dtype) const { return alone() && root_ == RootMethod::eigen && dtype == DType::f32; }
  bool keeps_roots() const { return !alone() && freq_ > 1; }
  bool has(Side side, const PieceGrid& grid) const {
    return both_ || (side == Side::left) == (grid.rows <= grid.cols);
  }
  std::vector<PieceGrid> grids_of(const Shape& matrix) const;
  int64_t largest_side(const PieceGrid& grid) const;
  Tensor state_of(const Block& block, const std::string& name) const;
  Tensor factor(const Batch& batch, size_t block, Side side, const char* suffix) const;
  int64_t batch_bytes(const Context& ctx, const PieceGrid& grid, int64_t pieces, DType dtype) const;
  int64_t at_once_of(const Context& ctx, const Group& group) const;

  template <typename Body>
  void for_each_batch(Context& ctx, Blocks blocks, Body&& body) const;
  void update_factors(Context& ctx, const Batch& batch, const RuleStep& step) const;
  Tensor load_factors(Context& ctx, const Batch& batch, Side side, const char* suffix, double gain) const;
  Tensor current_roots(Context& ctx, const Batch& batch, Side side, const RuleStep& step) const;
  Tensor roots(Context& ctx, const Batch& batch, Side side, const RuleStep& step) const;
  void take_roots(Context& ctx, const Tensor& a) const;
  double smooth_gradients(Context& ctx, Blocks blocks, const RuleStep& step) const;
  Tensor times_roots(Context& ctx, const Batch& batch, double gain, const RuleStep& step) const;
  Tensor grafted(Context& ctx, const Batch& batch, const Tensor& u, std::span<const Tensor> grafts,
                 const RuleStep& step) const;
  double precondition(Context& ctx, const Batch& batch, double gain, std::span<const Tensor> grafts,
                      const RuleStep& step) const;
  Measured some_blocks(Context& ctx, Blocks blocks, const RuleStep& step) const;

  Smoothing smoothing_;
  Graft graft_;
  std::string accumulate_;
  bool both_, bias_correction_;
  double beta_ = 0, exponent_, eps_;
  int64_t freq_ = 1, block_;
  RootMethod root_ = RootMethod::eigen;
  int steps_ = 30;
};
