// The optimizer's elementwise arithmetic: smoothing over time, Adam's direction, sign, and the update of a
// weight.
//
//   smooth          m <- beta m + gain scale g;    u = m, or with nesterov u = beta m + gain scale g (new m)
//                   Without m:  u = gain scale g, a scaled copy.
//   adam_direction  m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2       (g times scale first)
//                   u = (m / correction1) / (sqrt(v / correction2) + eps), and 0 where the denominator is 0
//                   Without m: m = g. Without v: v = g^2, so that sqrt(v) is exactly |g|.
//   sign            u = -1, 0 or 1; NaN for NaN
//   apply_update    w <- w - decay w - step u;     cautious: decay only where u w > 0, w before the step
//   clip_factor     norm = sqrt(sum of sums);  scale = min(1, limit / norm), or NaN when norm is not finite
//   add_diagonal    x[i][j][j] += value, for square matrices (batch, n, n)
//
// The first four take any number of tensors, which are independent, in as few kernel launches as their
// arguments fit into; a door for one tensor is the same with a list of one. Any shape; all tensors of one
// entry have the same number of elements. u may be g; else nothing overlaps. float32, but for bf16 where a
// field says so. Elementwise, so the same bits for any number of threads. A NaN in g reaches u.
//
// `scale` and `guard` are numbers that clip_factor has left where the operation runs, so that nobody waits
// for them. While such a number is NaN, the operation writes nothing: a gradient that is not finite changes
// neither weights nor state.
//
// Sources: Adam: Kingma & Ba, arXiv 1412.6980, Algorithm 1. Decoupled decay: Loshchilov & Hutter, arXiv
// 1711.05101. Cautious decay: decay only where it agrees with the step, as modded-nanogpt and nanochat do.
#pragma once

#include <span>

#include "model/kernels/context.h"

struct Smooth {
  Tensor u;               // written; may be g. On a GPU f32 or bf16, the same for all entries of a call
  Tensor m = {};          // the running mean or sum, updated; absent: nothing is remembered
  Tensor g;               // gradient. On a GPU f32 or bf16, the same for all entries of a call
  float beta = 0;         // how much of the old m is kept
  float gain = 1;         // 1 - beta for a mean, 1 for a sum
  Tensor scale = {};      // (1), multiplies g: gradient clipping; absent: 1
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
  Tensor scale = {};      // (1), multiplies g: gradient clipping; absent: 1
};

struct Sign {
  Tensor u;  // written; may be x
  Tensor x;  // any shape
};

struct ApplyUpdate {
  Tensor w;               // weight, updated
  Tensor u;               // direction
  Tensor copy = {};       // bf16, written: the new w, rounded to nearest, ties to even; absent: none
  float step;             // lr / s
  float decay = 0;        // lr * weight_decay
  bool cautious = false;  // decay only where u w > 0
  Tensor guard = {};      // (1): nothing is written when it is NaN; absent: never
};

struct ClipFactor {
  Tensor sums;   // (n) f64: sums of squares
  double limit;  // largest norm; 0: no clipping
  Tensor norm;   // (1) f64, written
  Tensor scale;  // (1) f32, written
};

struct AddDiagonal {
  Tensor x;     // (batch, n, n), updated
  float value;  // added to every diagonal element
};

namespace cpu {
void smooth(Context& ctx, std::span<const Smooth> list);
void adam_direction(Context& ctx, std::span<const AdamDirection> list);
void sign(Context& ctx, std::span<const Sign> list);
void apply_update(Context& ctx, std::span<const ApplyUpdate> list);
void clip_factor(Context& ctx, const ClipFactor& args);
void add_diagonal(Context& ctx, const AddDiagonal& args);
}  // namespace cpu
namespace gpu {
void smooth(Context& ctx, std::span<const Smooth> list);
void adam_direction(Context& ctx, std::span<const AdamDirection> list);
void sign(Context& ctx, std::span<const Sign> list);
void apply_update(Context& ctx, std::span<const ApplyUpdate> list);
void clip_factor(Context& ctx, const ClipFactor& args);
void add_diagonal(Context& ctx, const AddDiagonal& args);
}  // namespace gpu

/// What each must do at least, for the profile: elementwise operations move every operand once.
inline Work work(const Smooth& a) {
  const double n = static_cast<double>(a.g.size());
  return {.flops = (a.m ? (a.nesterov ? 5 : 3) : 1) * n,
          .bytes = 1.0 * (a.u.bytes() + a.g.bytes() + (a.m ? 2 * a.m.bytes() : 0))};
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
  return {.flops = 4 * n, .bytes = (a.copy ? 14 : 12) * n};
}
template <typename Entry>
Work work(std::span<const Entry> list) {
  Work sum;
  for (const Entry& entry : list) {
    const Work one = work(entry);
    sum.flops += one.flops;
    sum.bytes += one.bytes;
  }
  return sum;
}

inline void smooth(Context& ctx, std::span<const Smooth> list) {
  for (const Smooth& args : list) {
    expect(args.u.size() == args.g.size(), "smooth: u and g differ in size");
    expect(!args.m || args.m.size() == args.g.size(), "smooth: m and g differ in size");
    expect(args.u.dtype == list[0].u.dtype && args.g.dtype == list[0].g.dtype,
           "smooth: entries differ in dtype");
  }
  ON_DEVICE(smooth, ctx, list);
}
inline void smooth(Context& ctx, const Smooth& args) {
  smooth(ctx, std::span(&args, 1));
}

inline void adam_direction(Context& ctx, std::span<const AdamDirection> list) {
  for (const AdamDirection& args : list) {
    expect(args.u.size() == args.g.size(), "adam_direction: u and g differ in size");
    expect(args.m ? args.m.size() == args.g.size() : args.beta1 == 0, "adam_direction: m must have g's size");
    expect(args.v ? args.v.size() == args.g.size() : args.beta2 == 0, "adam_direction: v must have g's size");
  }
  ON_DEVICE(adam_direction, ctx, list);
}
inline void adam_direction(Context& ctx, const AdamDirection& args) {
  adam_direction(ctx, std::span(&args, 1));
}

inline void sign(Context& ctx, std::span<const Sign> list) {
  for (const Sign& args : list) expect(args.u.size() == args.x.size(), "sign: u and x differ in size");
  ON_DEVICE(sign, ctx, list);
}
inline void sign(Context& ctx, const Sign& args) {
  sign(ctx, std::span(&args, 1));
}

inline void apply_update(Context& ctx, std::span<const ApplyUpdate> list) {
  for (const ApplyUpdate& args : list) {
    expect(args.w.size() == args.u.size(), "apply_update: w and u differ in size");
    expect(!args.copy || args.copy.size() == args.w.size(), "apply_update: w and copy differ in size");
  }
  ON_DEVICE(apply_update, ctx, list);
}
inline void apply_update(Context& ctx, const ApplyUpdate& args) {
  apply_update(ctx, std::span(&args, 1));
}

inline void clip_factor(Context& ctx, const ClipFactor& args) {
  expect_shape(args.norm, {1}, "clip_factor: norm");
  expect_shape(args.scale, {1}, "clip_factor: scale");
  ON_DEVICE(clip_factor, ctx, args);
}

inline void add_diagonal(Context& ctx, const AddDiagonal& args) {
  expect(args.x.shape.rank() == 3 && args.x.shape[1] == args.x.shape[2],
         "add_diagonal: x must be (batch, n, n)");
  ON_DEVICE(add_diagonal, ctx, args);
}
