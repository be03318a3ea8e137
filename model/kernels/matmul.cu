#include "model/kernels/matmul.h"

#include "model/kernels/gemm.h"

// No kernel of ours: a product is cuBLASLt's (gemm.h), with its epilogue where that measures faster.

namespace {
/// The last two dimensions, without gaps.
GemmMatrix operand(const Tensor& t, int64_t rows, int64_t cols) {
  return {.data = t.data, .dtype = t.dtype, .ld = cols, .stride = rows * cols};
}

Gemm translate(const Matmul& args) {
  const int64_t M = args.c.rows(), N = args.c.cols(), K = args.transpose_a ? args.a.rows() : args.a.cols();
  const GemmMatrix c = operand(args.c, M, N);
  Gemm gemm{.M = M,
            .N = N,
            .K = K,
            .transpose_a = args.transpose_a,
            .transpose_b = args.transpose_b,
            .a = operand(args.a, args.a.rows(), args.a.cols()),
            .b = operand(args.b, args.b.rows(), args.b.cols()),
            .c = c,
            .d = c,
            .alpha = args.alpha,
            .beta = args.beta,
            .bias = args.bias.data};
  if (args.pre_gelu) {
    gemm.epilogue = GemmEpilogue::gelu;
    gemm.aux = args.pre_gelu.data;
  } else if (args.gelu_input) {
    gemm.epilogue = GemmEpilogue::dgelu;
    gemm.aux = args.gelu_input.data;
  } else if (args.dbias) {
    gemm.epilogue = GemmEpilogue::dbias;
    gemm.dbias = args.dbias.f32();
    gemm.add_to_dbias = args.beta != 0;
  }
  return gemm;
}
}  // namespace

void gpu::matmul(Context& ctx, const Matmul& args) {
  gemm(ctx, translate(args));
}

void gpu::batched_matmul(Context& ctx, const BatchedMatmul& args) {
  const auto matrices = [](const Tensor& t) { return operand(t, t.shape[1], t.shape[2]); };
  const GemmMatrix d = matrices(args.c);
  gemm(ctx, {.batch = args.c.shape[0],
             .M = args.c.shape[1],
             .N = args.c.shape[2],
             .K = args.a.shape[args.transpose_a ? 1 : 2],
             .transpose_a = args.transpose_a,
             .transpose_b = args.transpose_b,
             .a = matrices(args.a),
             .b = matrices(args.b),
             .c = args.addend ? matrices(args.addend) : d,
             .d = d,
             .alpha = args.alpha,
             .beta = args.beta});
}
