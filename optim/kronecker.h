// What shampoo and soap share: the two factors of a matrix's second moment, L of its rows and R of its
// columns,
//
//   L <- beta L + gain G G^T          (rows, rows)
//   R <- beta R + gain G^T G          (cols, cols)
//
// and how state that an operation without a guard computes (a product, a root, a basis) reaches its tensor:
// through scratch and one guarded pass, so that a gradient that is not finite leaves it alone (rule.h).
#pragma once

#include <span>
#include <string>
#include <vector>

#include "optim/rule.h"

enum class Side : uint8_t { left, right };  // of G: L, R
constexpr Side kSides[] = {Side::left, Side::right};

/// The side of L or R for a matrix (rows, cols).
inline int64_t side_length(Side side, int64_t rows, int64_t cols) {
  return side == Side::left ? rows : cols;
}

/// "L" or "R".
std::string factor_name(Side side);

/// (N, n, n) at the start of `memory`, for the products of x (N, rows, cols).
Tensor room_for(const Tensor& memory, const Tensor& x, Side side);

/// Matrices (N, rows, cols) whose Frobenius norm is above 1e18 (f64: 1e150) are scaled down to it, so that
/// their squares are finite; the others keep their bits, those with a NaN or infinity too.
void bound(Context& ctx, const Tensor& x);
/// Scratch of bound() for N matrices of `size` elements.
int64_t bound_scratch_bytes(int64_t N, int64_t size);

/// products[i] = x[i] x[i]^T, or x[i]^T x[i] on the right. x (N, rows, cols), products (N, n, n).
void gram(Context& ctx, const Tensor& products, const Tensor& x, Side side);

/// What a tensor of state is to become.
struct StateValue {
  Tensor state;
  Tensor value;  // as many elements
};

/// L <- beta L + gain P for products P of gradients that step.grad_scale has not been applied to: it enters
/// squared. The values are scaled once on the way.
void accumulate(Context& ctx, std::span<const StateValue> list, double beta, double gain,
                const RuleStep& step);

/// The state becomes the value.
void keep(Context& ctx, std::span<const StateValue> list, const RuleStep& step);
