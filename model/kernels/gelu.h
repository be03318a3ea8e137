// GELU, the activation of GPT-2's feed-forward layer, in the tanh form that OpenAI trained with.
//
//   u(x)  = sqrt(2 / pi) (x + 0.044715 x^3)
//   y     = x/2 (1 + tanh u)
//   dy/dx = (1 + tanh u)/2 + x/2 (1 - tanh^2 u) u'(x),    u'(x) = sqrt(2 / pi) (1 + 3 * 0.044715 x^2)
//
// Shapes: any; all tensors of one call have the same. dtype: f32, or on a GPU bf16, the same for all.
// Aliasing: y may be x; dx may be dy. (The backward half needs x, so a training pass keeps x apart from y.)
// Deterministic for any number of threads: elements are independent.
// Source: Hendrycks & Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415, section 2, the tanh
// approximation.
//
// This is the smallest complete operation: copy gelu.h, gelu.cpp, gelu.cu and tests/cases/gelu.h to
// begin a new one.
#pragma once

#include "model/kernels/context.h"

struct GeluForward {
  Tensor y;  // (B, T, C), written
  Tensor x;  // (B, T, C), read
};

struct GeluBackward {
  Tensor dx;  // (B, T, C), written: gradient of the loss with respect to x
  Tensor dy;  // (B, T, C), read: gradient with respect to y
  Tensor x;   // (B, T, C), read: the input of the forward half
};

/// What a call must do at least, for profiles (profile.h): here, move each tensor once.
inline Work work(const GeluForward& args) {
  return {.bytes = 2.0 * args.x.bytes()};
}
inline Work work(const GeluBackward& args) {
  return {.bytes = 3.0 * args.x.bytes()};
}

// One half per device: gelu.cpp, and gelu.cu in binaries with CUDA.
namespace cpu {
void gelu_forward(Context& ctx, const GeluForward& args);
void gelu_backward(Context& ctx, const GeluBackward& args);
}  // namespace cpu
namespace gpu {
void gelu_forward(Context& ctx, const GeluForward& args);
void gelu_backward(Context& ctx, const GeluBackward& args);
}  // namespace gpu

// The doors: what everybody calls. Shapes are checked here, once for both devices.
inline void gelu_forward(Context& ctx, const GeluForward& args) {
  expect_shape(args.y, args.x.shape, "gelu_forward: y");
  ON_DEVICE(gelu_forward, ctx, args);
}

inline void gelu_backward(Context& ctx, const GeluBackward& args) {
  expect_shape(args.dx, args.x.shape, "gelu_backward: dx");
  expect_shape(args.dy, args.x.shape, "gelu_backward: dy");
  ON_DEVICE(gelu_backward, ctx, args);
}
