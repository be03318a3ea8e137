#include "model/kernels/matmul.h"

#include <omp.h>
#include <oneapi/dnnl/dnnl.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "model/kernels/simd.h"

namespace {
/// One product of row-major matrices, c = alpha op(a) op(b) + beta c; ld: elements from one row to the next.
struct Product {
  bool transpose_a, transpose_b;
  int64_t M, N, K;
  float alpha;
  const float* a;
  int64_t lda;
  const float* b;
  int64_t ldb;
  float beta;
  float* c;
  int64_t ldc;
};

void sgemm(const Product& p) {
  const dnnl_status_t status =
      dnnl_sgemm(p.transpose_a ? 'T' : 'N', p.transpose_b ? 'T' : 'N', p.M, p.N, p.K, p.alpha, p.a, p.lda, p.b,
                 p.ldb, p.beta, p.c, p.ldc);
  if (status != dnnl_success) throw std::runtime_error("matmul: oneDNN's sgemm failed, probably out of memory");
}

void check_sizes(const char* op, const Shape& c, const Shape& a, const Shape& b, bool transpose_a,
                 bool transpose_b) {
  const auto sizes = [](const Shape& s, bool transposed) {
    return transposed ? Shape{s[1], s[0]} : s;
  };
  const Shape left = sizes(a, transpose_a), right = sizes(b, transpose_b);
  if (left[1] != right[0] || c[0] != left[0] || c[1] != right[1])
    throw ShapeError(std::string(op) + ": got c " + c.str() + ", op(a) " + left.str() + ", op(b) " + right.str() +
                     ", need (M, N), (M, K), (K, N)");
}
}  // namespace

void check(const Matmul& args) {
  const auto matrix = [](const Tensor& t) { return Shape{t.rows(), t.cols()}; };
  check_sizes("matmul", matrix(args.c), matrix(args.a), matrix(args.b), args.transpose_a, args.transpose_b);
  if (args.bias) expect_shape(args.bias, {args.c.cols()}, "matmul: bias");
}

void check(const BatchedMatmul& args) {
  const bool ranks = args.c.shape.rank() == 3 && args.a.shape.rank() == 3 && args.b.shape.rank() == 3;
  expect(ranks, "batched_matmul: tensors must be (batch, rows, cols)");
  const auto matrix = [](const Tensor& t) { return Shape{t.shape[1], t.shape[2]}; };
  check_sizes("batched_matmul", matrix(args.c), matrix(args.a), matrix(args.b), args.transpose_a,
              args.transpose_b);
  expect(args.a.shape[0] == args.c.shape[0] && args.b.shape[0] == args.c.shape[0],
         "batched_matmul: tensors need the same batch");
  expect(!args.symmetric || args.c.shape[1] == args.c.shape[2], "batched_matmul: a symmetric c must be square");
  if (args.addend) expect_shape(args.addend, args.c.shape, "batched_matmul: addend");
}

void cpu::matmul(Context& ctx, const Matmul& args) {
  const int64_t M = args.c.rows(), N = args.c.cols();
  const int64_t K = args.transpose_a ? args.a.rows() : args.a.cols();
  float* c = args.c.f32();
  float beta = args.beta;
  if (args.bias) {
    const float* bias = args.bias.f32();
    parallel_for(ctx, M, std::max<int64_t>(1, 16384 / N), [=](int64_t begin, int64_t end, int) {
      for (int64_t m = begin; m < end; ++m) {
        float* row = c + m * N;
        if (beta == 0) {
          std::copy(bias, bias + N, row);
        } else {
#pragma omp simd
          for (int64_t n = 0; n < N; ++n) row[n] = beta * row[n] + bias[n];
        }
      }
    });
    beta = 1;
  }
  if (omp_get_max_threads() != ctx.threads) omp_set_num_threads(ctx.threads);
  sgemm({args.transpose_a, args.transpose_b, M, N, K, args.alpha, args.a.f32(), args.a.cols(), args.b.f32(),
         args.b.cols(), beta, c, N});
}

void cpu::batched_matmul(Context& ctx, const BatchedMatmul& args) {
  if (omp_get_max_threads() != ctx.threads) omp_set_num_threads(ctx.threads);
  for (int64_t i = 0; i < args.c.shape[0]; ++i) {
    const Tensor c = args.c[i], a = args.a[i], b = args.b[i];
    const int64_t K = args.transpose_a ? a.rows() : a.cols();
    if (args.addend && args.addend.data != args.c.data)
      std::memcpy(c.f32(), args.addend[i].f32(), static_cast<size_t>(c.bytes()));
    sgemm({args.transpose_a, args.transpose_b, c.rows(), c.cols(), K, args.alpha, a.f32(), a.cols(), b.f32(), b.cols(),
           args.beta, c.f32(), c.cols()});
    if (args.symmetric) {
      const int64_t n = c.rows();
      float* m = c.f32();
      for (int64_t r = 0; r < n; ++r)
        for (int64_t k = 0; k < r; ++k) m[k * n + r] = m[r * n + k];
    }
  }
}
