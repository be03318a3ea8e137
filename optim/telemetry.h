// Telemetry: what a step did, in the paper's quantities. Per tensor l with its rule's norm ||.||_l, its
// sensitivity s_l, gradient G_l and direction u_l (rule.h: W <- W - decay W - step u):
//
//   weight         ||W_l||_l before the step
//   gradient_dual  ||G_l||_l^dual of this step's gradient, not smoothed, not clipped
//   update         ||u_l||_l: 1 for an exact dual vector of radius 1
//   alignment      <G_l, u_l> / (||G_l||_l^dual ||u_l||_l), in [-1, 1]; 1: steepest descent under the norm
//                  (momentum, second moments and approximate polar factors all lower it)
//   step           (lr / s_l) ||u_l||_l, the effective step; s_step = s_l times that, Proposition 7's eta
//   band           smallest and largest singular value of u_l, over norm.h's factor k where the norm is
//                  spectral (so that 1, 1 is exact); of matrices but embeddings that no spectral norm
//                  measures
//   sharpness      <G'_l - G_l, dW_l> / ||dW_l||_l^2: the mean curvature of the loss along the step
//
// dW = W' - W is the true change of the weights: decay, hyperball, QK clip and rounding included. G' is the
// gradient on the same batch after the step, of all tensors at once: a tensor's sharpness contains what the
// steps of the others did to its gradient. A fused q, k, v is a product of three matrices: norm and band are
// the widest of its blocks', the dual norm their sum, so that Hoelder's inequality holds for the whole.
//
// For the network, under the modular norm (modular.h):
//
//   predicted      sum_l <G_l, dW_l>, the change of the loss to first order
//   length         max_l s_l ||dW_l||_l
//   sharpness      lambda = sum_l <G'_l - G_l, dW_l> / length^2
//   bound          loss + predicted + (lambda / 2) length^2: equal to loss_after where the loss is quadratic
//                  along the step. Propositions 1 and 6 guarantee loss_after <= bound for a lambda that is at
//                  least the sharpness on the whole way; this lambda is only its mean over the way
//
// Undefined numbers (a zero step, a zero gradient) are NaN. With bf16 products G' - G is mostly the rounding
// of the weights' copies when steps are small: read sharpness from fp32.
//
// Looks at whole tensors: with several ranks gradients() leaves complete gradients on every rank, update()
// the directions of all owners, and gather() brings together what each has found of its own rows of W and dW.
// Then all ranks find the same numbers.
//
// A measured step moves the weights as any other, bit for bit. It takes a second forward and backward pass
// and some products per matrix: singular values come from an SVD up to a smaller side of kExactSide, from
// Lanczos beyond, where nuclear norms are <G, polar(G)>. It waits, so it is never in a CUDA graph. Two copies
// of all parameters are kept when `every` > 0: W, later dW; and G. Deterministic as the operations are.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "model/parameters.h"
#include "optim/lanczos.h"
#include "optim/optimizer.h"

struct TensorNorms {
  std::string name;
  Role role;
  Norm norm;
  double weight = 0, gradient_dual = 0, update = 0, alignment = 0, step = 0, s_step = 0, sharpness = 0;
  std::optional<SingularBand> band = {};
};

struct StepNorms {
  int64_t step = 0;  // counted from 0
  double loss = 0, loss_after = 0, predicted = 0, bound = 0, length = 0, sharpness = 0;
  std::vector<TensorNorms> tensors = {};  // in the order of the table
};

/// The nuclear norm of a matrix (rows, cols), f32, as <G, polar(G)> by Newton-Schulz: 1e-3 too small at most
/// for singular values of any usual spread. Waits.
double nuclear_norm(Context& ctx, const Tensor& g);
int64_t nuclear_norm_scratch_bytes(const Context& ctx, int64_t rows, int64_t cols);

class Telemetry {
 public:
  static constexpr int64_t kExactSide = 128;

  /// Measures every `every`-th step, from the first on; 0: none, and no memory. Nothing is allocated yet.
  Telemetry(Context& ctx, const ParameterTable& table, const Optimizer& optimizer, int64_t every);
  /// Takes the copies and reserves ctx.scratch. Call after the optimizer's allocate().
  void allocate();
  int64_t bytes() const { return every_ > 0 ? arena_.bytes() : 0; }
  int64_t scratch_bytes() const;

  bool due(int64_t step) const { return every_ > 0 && step % every_ == 0; }

  struct Step {
    int64_t t;                          // counted from 0
    std::function<double()> gradients;  // writes Parameter::grad of the step's batch, returns its loss
    std::function<void()> update;       // calls Optimizer::step(t, total, keep_directions = true)
    // With several ranks: afterwards every rank has the owners' rows of these, one for each parameter.
    std::function<void(std::span<const Tensor>)> gather = {};
  };
  /// Makes one step and measures it. Calls gradients(), update(), gradients(): afterwards Parameter::grad
  /// holds G'.
  StepNorms measure(const Step& step);

 private:
  struct Kept {
    const Parameter* parameter;
    Tensor change, gradient;  // W, later dW; G
  };
  void keep();
  void gather_changes(const Step& step);
  TensorNorms all_but_sharpness(const Kept& kept, const RowStep& row);
  double norm_of(const Norm& norm, const Tensor& tensor, const Parameter& p);
  double dual_norm_of(const Norm& norm, const Tensor& tensor, const Parameter& p);
  SingularBand band_of(const Tensor& block);

  Context& ctx_;
  const Optimizer& optimizer_;
  int64_t every_;
  std::vector<Kept> kept_;
  Arena arena_{"telemetry"};
};
