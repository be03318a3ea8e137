// The optimizer's elementwise arithmetic: smoothing over time, Adam's direction, sign, and the update of a
// weight.
//
//   smooth            m <- beta m + gain scale g;    u = m, or with nesterov u = beta m + gain scale g   (the
//   new m)
//                     Without m:  u = gain scale g, a scaled copy.
//   adam_direction    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2       (g times scale
//   first)
//                     u = (m / correction1) / (sqrt(v / correction2) + eps), and 0 where the denominator is 0
//                     Without m: m = g. Without v: v = g^2, so that sqrt(v) is exactly |g|.
//   sign              u = -1, 0 or 1; NaN for NaN
//   apply_update      w <- w - decay w - step u;     cautious: decay only where u w > 0, w before the step
//   add_diagonal      x[i][j][j] += value, for square matrices (batch, n, n)
//   sum_abs           sum |x|, in float64
//
// Any shape, float32; all tensors of one call have the same number of elements. u may be g; else nothing
// overlaps. Elementwise, so the same bits for any number of threads; sum_abs adds chunks whose bounds depend
// on the size alone. A NaN in g reaches u.
//
// Sources: Adam: Kingma & Ba, arXiv 1412.6980, Algorithm 1. Decoupled decay: Loshchilov & Hutter, arXiv
// 1711.05101. Cautious decay: decay only where it agrees with the step, as modded-nanogpt and nanochat do.
#pragma once

#include "model/kernels/context.h"

struct Smooth {
  Tensor u;               // written; may be g
  Tensor m = {};          // the running mean or sum, updated; absent: nothing is remembered
  Tensor g;               // gradient
  float beta = 0;         // how much of the old m is kept
  float gain = 1;         // 1 - beta for a mean, 1 for a sum
  float scale = 1;        // multiplies g: gradient clipping
  bool nesterov = false;  // look one step ahead
};

struct AdamDirection {
  Tensor u;               // written; may be g
  Tensor m = {};          // first moment, updated; absent when beta1 = 0
  Tensor v = {};          // second moment, updated; absent when beta2 = 0
  Tensor g;               // gradient
  float beta1;            // decay of m
  float beta2;            // decay of v
  float eps;              // added to the root
  float correction1 = 1;  // 1 - beta1^t, or 1: no bias correction
  float correction2 = 1;  // 1 - beta2^t
  float scale = 1;        // multiplies g: gradient clipping
};

struct Sign {
  Tensor u;  // written; may be x
  Tensor x;  // any shape
};

struct ApplyUpdate {
  Tensor w;               // weight, updated
  Tensor u;               // direction
  float step;             // lr / s
  float decay = 0;        // lr * weight_decay
  bool cautious = false;  // decay only where u w > 0
};

struct AddDiagonal {
  Tensor x;     // (batch, n, n), updated
  float value;  // added to every diagonal element
};

namespace cpu {
void smooth(Context& ctx, const Smooth& args);
void adam_direction(Context& ctx, const AdamDirection& args);
void sign(Context& ctx, const Sign& args);
void apply_update(Context& ctx, const ApplyUpdate& args);
void add_diagonal(Context& ctx, const AddDiagonal& args);
double sum_abs(Context& ctx, const Tensor& x);
}  // namespace cpu
namespace gpu {
void smooth(Context& ctx, const Smooth& args);
void adam_direction(Context& ctx, const AdamDirection& args);
void sign(Context& ctx, const Sign& args);
void apply_update(Context& ctx, const ApplyUpdate& args);
void add_diagonal(Context& ctx, const AddDiagonal& args);
double sum_abs(Context& ctx, const Tensor& x);
}  // namespace gpu

/// What each must do at least, for the profile: elementwise operations move every operand once.
inline Work work(const Smooth& a) {
  const double n = static_cast<double>(a.g.size());
  return {.flops = (a.m ? (a.nesterov ? 5 : 3) : 1) * n, .bytes = 4 * (a.m ? 4 : 2) * n};
}
inline Work work(const AdamDirection& a) {
  const double n = static_cast<double>(a.g.size());
  return {.flops = 13 * n, .bytes = 4 * (2.0 + (a.m ? 2 : 0) + (a.v ? 2 : 0)) * n};
}
inline Work work(const Sign& a) {
  return {.flops = 0, .bytes = 8.0 * static_cast<double>(a.x.size())};
}
inline Work work(const ApplyUpdate& a) {
  const double n = static_cast<double>(a.w.size());
  return {.flops = 4 * n, .bytes = 12 * n};
}

inline void smooth(Context& ctx, const Smooth& args) {
  expect(args.u.size() == args.g.size(), "smooth: u and g differ in size");
  expect(!args.m || args.m.size() == args.g.size(), "smooth: m and g differ in size");
  ON_DEVICE(smooth, ctx, args);
}

inline void adam_direction(Context& ctx, const AdamDirection& args) {
  expect(args.u.size() == args.g.size(), "adam_direction: u and g differ in size");
  expect(args.m ? args.m.size() == args.g.size() : args.beta1 == 0, "adam_direction: m must have g's size");
  expect(args.v ? args.v.size() == args.g.size() : args.beta2 == 0, "adam_direction: v must have g's size");
  ON_DEVICE(adam_direction, ctx, args);
}

inline void sign(Context& ctx, const Sign& args) {
  expect(args.u.size() == args.x.size(), "sign: u and x differ in size");
  ON_DEVICE(sign, ctx, args);
}

inline void apply_update(Context& ctx, const ApplyUpdate& args) {
  expect(args.w.size() == args.u.size(), "apply_update: w and u differ in size");
  ON_DEVICE(apply_update, ctx, args);
}

inline void add_diagonal(Context& ctx, const AddDiagonal& args) {
  expect(args.x.shape.rank() == 3 && args.x.shape[1] == args.x.shape[2],
         "add_diagonal: x must be (batch, n, n)");
  ON_DEVICE(add_diagonal, ctx, args);
}

/// Sum of |x| over all elements: the dual of the l1->linf norm.
inline double sum_abs(Context& ctx, const Tensor& x) {
  ON_DEVICE(sum_abs, ctx, x);
}
