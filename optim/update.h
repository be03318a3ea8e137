// The optimizer's elementwise arithmetic: smoothing over time, Adam's direction, sign, and the update of a
// weight.
//
// With x = scale g:
//   smooth          m <- beta m + gain x;          u = m
//                   nesterov:  u = beta m + gain x, one step ahead of the new m
//                   look:      u = look.m m + look.g x, with the old m; Lion: beta1 m + (1 - beta1) x
//                   sign:      u = sign of that
//                   Without m:  u = gain x, a scaled copy, or its sign; of u = g by 1, a clip that does not
//                   clip, no memory is touched.
//   adam_direction  x = scale gain g;  m <- beta1 m + (1 - beta1) x;  v <- beta2 v + (1 - beta2) x^2
//                   u = (m / correction1) / (sqrt(v / correction2) + eps), and 0 where the denominator is 0
//                   Without m: m = x. Without v: v = x^2, so that sqrt(v) is exactly |x|.
//   sign            u = -1, 0 or 1; NaN for NaN
//   apply_update    w <- w - decay w - step u;     cautious: decay only where u w > 0, w before the step
//   clip_factor     norm = sqrt(sum of sums);  scale = min(1, limit / norm), or NaN when norm is not finite
//   add_diagonal    x[i][j][j] += value, for square matrices (batch, n, n)
//
// smooth and adam_direction can apply_update their direction in the same pass over memory (`into`), and then
// need no u: Adam moves 28 bytes for each float32 parameter instead of 40, Lion 20 instead of 28. The results
// are those of the two operations, bit for bit.
//
// The first four take any number of tensors, which are independent, in as few kernel launches as their
// arguments fit into; a door for one tensor is the same with a list of one. Any shape; all tensors of one
// entry have the same number of elements. u may be g; else nothing overlaps. float32, or float64 for all
// tensors of a call; a field says what else it may be. `scale` and `guard` are float32 always. The numbers of
// an entry are rounded once to the dtype of the tensors. Elementwise, so the same bits for any number of
// threads. A NaN in g reaches u.
//
// Adam's m and v, and m of smooth where that is asked for, keep 0 in the place of a denormal number. In
// float32 0.9 x of the smallest ones is x again: what decays for want of gradients would stop there and never
// reach 0, and some processors take a hundred times as long for each. Directions are made before.
//
// `scale` and `guard` are numbers that clip_factor has left where the operation runs, so that nobody waits
// for them. While such a number is NaN, the operation writes nothing: a gradient that is not finite changes
// neither weights nor state.
//
// Sources: Adam: Kingma & Ba, arXiv 1412.6980, Algorithm 1. Decoupled decay: Loshchilov & Hutter, arXiv
// 1711.05101. Lion: Chen et al., arXiv 2302.06675, Algorithm 2. Cautious decay: decay only where it agrees
// with the step, as modded-nanogpt and nanochat do.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "model/kernels/context.h"

/// The weight that a direction moves, in the pass that makes the direction: ApplyUpdate without u.
struct ApplyTo {
  Tensor w = {};          // weight, updated; absent: nothing is moved
  Tensor copy = {};       // bf16, written: the new w, rounded to nearest, ties to even; absent: none
  double step = 0;        // lr / s
  double decay = 0;       // lr * weight_decay
  bool cautious = false;  // decay only where u w > 0
  Tensor guard = {};      // (1): nothing is written, state included, when it is NaN; absent: never
};

/// A mixture of the m before the step and of x.
struct Look {
  double m;  // how much of m
  double g;  // how much of x
};

struct Smooth {
  Tensor u = {};          // written; may be g. Absent: not kept. On a GPU f32 or bf16, the same for all
                          // entries of a call; with `into` the dtype of w
  Tensor m = {};          // the running mean or sum, updated; absent: nothing is remembered
  Tensor g;               // gradient. On a GPU f32 or bf16, the same for all entries of a call
  double beta = 0;        // how much of the old m is kept
  double gain = 1;        // 1 - beta for a mean, 1 for a sum
  Tensor scale = {};      // (1), multiplies g: gradient clipping; absent: 1
  bool nesterov = false;  // look one step ahead
  std::optional<Look> look = {};  // another mixture than the new m. Needs m, excludes nesterov
  bool sign = false;              // u is a sign
  bool drop_denormals = false;    // m keeps 0 in the place of a denormal number
  ApplyTo into = {};              // the weight that u moves
};

/// Whether u is another mixture than the new m, and which, of the m before the step:
/// nesterov is beta (beta m + gain x) + gain x.
inline bool looks_ahead(const Smooth& a) {
  return a.nesterov || a.look.has_value();
}
inline Look look_of(const Smooth& a) {
  return a.look.value_or(Look{.m = a.beta * a.beta, .g = a.beta * a.gain + a.gain});
}

struct AdamDirection {
  Tensor u = {};           // written; may be g. Absent: not kept
  Tensor m = {};           // first moment, updated; absent when beta1 = 0
  Tensor v = {};           // second moment, updated; absent when beta2 = 0
  Tensor g;                // gradient
  double beta1;            // decay of m
  double beta2;            // decay of v
  double eps;              // added to the root
  double correction1 = 1;  // 1 - beta1^t, or 1: no bias correction
  double correction2 = 1;  // 1 - beta2^t
  double gain = 1;         // multiplies g, before the scale
  Tensor scale = {};       // (1), multiplies g: gradient clipping; absent: 1
  ApplyTo into = {};       // the weight that u moves
};

struct Sign {
  Tensor u;  // written; may be x
  Tensor x;  // any shape
};

struct ApplyUpdate {
  Tensor w;               // weight, updated
  Tensor u;               // direction
  Tensor copy = {};       // bf16, written: the new w, rounded to nearest, ties to even; absent: none
  double step;            // lr / s
  double decay = 0;       // lr * weight_decay
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
  Tensor x;      // (batch, n, n), updated
  double value;  // added to every diagonal element
};

namespace cpu {
void smooth(Context& ctx, std::span<const Smooth> list);
void adam_direction(Context& ctx, std::span<const AdamDirection> list);
void apply_update(Context& ctx, std::span<const ApplyUpdate> list);
void clip_factor(Context& ctx, const ClipFactor& args);
void add_diagonal(Context& ctx, const AddDiagonal& args);
}  // namespace cpu
namespace gpu {
void smooth(Context& ctx, std::span<const Smooth> list);
void adam_direction(Context& ctx, std::span<const AdamDirection> list);
void apply_update(Context& ctx, std::span<const ApplyUpdate> list);
void clip_factor(Context& ctx, const ClipFactor& args);
void add_diagonal(Context& ctx, const AddDiagonal& args);
}  // namespace gpu

/// What each must do at least, for the profile: elementwise operations move every operand once.
inline Work work(const ApplyTo& a) {
  const double n = a.w ? static_cast<double>(a.w.size()) : 0;
  return {.flops = 4 * n,
          .bytes = a.w ? static_cast<double>(2 * a.w.bytes() + (a.copy ? 2 : 0) * a.w.size()) : 0};
}
inline double bytes_of(const Tensor& x) {
  return x ? static_cast<double>(x.bytes()) : 0;
}
inline Work work(const Smooth& a) {
  const double n = static_cast<double>(a.g.size());
  const Work into = work(a.into);
  return {.flops = (a.m ? (a.nesterov || a.look ? 6 : 3) : 1) * n + into.flops,
          .bytes = bytes_of(a.u) + bytes_of(a.g) + 2 * bytes_of(a.m) + into.bytes};
}
inline Work work(const AdamDirection& a) {
  const double n = static_cast<double>(a.g.size());
  const Work into = work(a.into);
  return {.flops = 13 * n + into.flops,
          .bytes = bytes_of(a.u) + bytes_of(a.g) + 2 * (bytes_of(a.m) + bytes_of(a.v)) + into.bytes};
}
inline Work work(const ApplyUpdate& a) {
  const Work into = work(ApplyTo{.w = a.w, .copy = a.copy});
  return {.flops = into.flops, .bytes = into.bytes + bytes_of(a.u)};
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

/// What both operations that can move a weight ask of their entry.
inline void expect_directed(const Tensor& u, const Tensor& g, const ApplyTo& into, const char* message) {
  expect(!u || u.size() == g.size(), message);
  expect(!into.w || into.w.size() == g.size(), message);
  expect(!into.copy || (into.w && into.copy.size() == g.size()), message);
  expect(!into.w || !u || u.dtype == into.w.dtype, message);
}

inline void smooth(Context& ctx, std::span<const Smooth> list) {
  for (const Smooth& args : list) {
    expect_directed(args.u, args.g, args.into, "smooth: u, w or copy do not fit g, or u not w");
    expect(!args.m || args.m.size() == args.g.size(), "smooth: m and g differ in size");
    expect(!args.look || (args.m && !args.nesterov), "smooth: look needs m and excludes nesterov");
    expect(args.g.dtype == list[0].g.dtype && (args.u ? 1 : 0) == (list[0].u ? 1 : 0) &&
               (!args.u || args.u.dtype == list[0].u.dtype),
           "smooth: entries differ in dtype");
  }
  ON_DEVICE(smooth, ctx, list);
}
inline void smooth(Context& ctx, const Smooth& args) {
  smooth(ctx, std::span(&args, 1));
}

inline void expect_adam(std::span<const AdamDirection> list) {
  for (const AdamDirection& args : list) {
    expect_directed(args.u, args.g, args.into, "adam_direction: u, w or copy do not fit g, or u not w");
    expect(args.g.dtype == list[0].g.dtype, "adam_direction: entries differ in dtype");
    expect(args.m ? args.m.size() == args.g.size() : args.beta1 == 0, "adam_direction: m must have g's size");
    expect(args.v ? args.v.size() == args.g.size() : args.beta2 == 0, "adam_direction: v must have g's size");
  }
}
inline void adam_direction(Context& ctx, std::span<const AdamDirection> list) {
  expect_adam(list);
  ON_DEVICE(adam_direction, ctx, list);
}
inline void adam_direction(Context& ctx, const AdamDirection& args) {
  adam_direction(ctx, std::span(&args, 1));
}

/// smooth without a memory.
inline void sign(Context& ctx, std::span<const Sign> list) {
  std::vector<Smooth> entries;
  for (const Sign& args : list) entries.push_back({.u = args.u, .g = args.x, .sign = true});
  smooth(ctx, entries);
}
inline void sign(Context& ctx, const Sign& args) {
  sign(ctx, std::span(&args, 1));
}

inline void apply_update(Context& ctx, std::span<const ApplyUpdate> list) {
  for (const ApplyUpdate& args : list) {
    expect(args.w.size() == args.u.size(), "apply_update: w and u differ in size");
    expect(!args.copy || args.copy.size() == args.w.size(), "apply_update: w and copy differ in size");
    expect(args.w.dtype == list[0].w.dtype, "apply_update: entries differ in dtype");
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
