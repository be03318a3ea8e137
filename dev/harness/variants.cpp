#include "dev/harness/variants.h"

#include <algorithm>

#include "model/kernels/simd.h"

#if HAVE_GPU_KERNELS
#include "dev/lab/gemm_wgmma.h"
#endif

namespace {
/// c = alpha op(a) op(b) + bias + beta addend: pointers to one matrix each.
struct Product {
  float* c;
  const float *a, *b, *bias, *addend;
  int64_t M, N, K;
  bool ta, tb;
  float alpha, beta;

  void run(const Context& ctx) const {
    parallel_for(ctx, M, kRows, [this](int64_t begin, int64_t end, int) {
      for (int64_t m = begin; m < end; m += kRows) rows(m, std::min(end, m + kRows));
    });
  }

 private:
  static constexpr int64_t kRows = 8;  // share one walk over b

  void rows(int64_t begin, int64_t end) const {
    std::vector<double> left(static_cast<size_t>(K * kRows)), sums(static_cast<size_t>(N * kRows), 0.0);
    for (int64_t m = begin; m < end; ++m)
      for (int64_t k = 0; k < K; ++k)
        left[static_cast<size_t>((m - begin) * K + k)] = ta ? a[k * M + m] : a[m * K + k];
    if (tb) {
      for (int64_t n = 0; n < N; ++n)
        for (int64_t r = 0; r < end - begin; ++r)
          sums[static_cast<size_t>(r * N + n)] = dot(&left[r * K], b + n * K);
    } else {
      for (int64_t k = 0; k < K; ++k)
        for (int64_t r = 0; r < end - begin; ++r)
          add(&sums[r * N], left[static_cast<size_t>(r * K + k)], b + k * N);
    }
    for (int64_t i = 0; i < (end - begin) * N; ++i) {
      double sum = alpha * sums[static_cast<size_t>(i)];
      if (bias != nullptr) sum += bias[i % N];
      if (beta != 0) sum += static_cast<double>(beta) * addend[begin * N + i];
      c[begin * N + i] = static_cast<float>(sum);
    }
  }
  double dot(const double* x, const float* y) const {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < K; ++k) sum += x[k] * static_cast<double>(y[k]);
    return sum;
  }
  void add(double* to, double factor, const float* row) const {
#pragma omp simd
    for (int64_t n = 0; n < N; ++n) to[n] += factor * static_cast<double>(row[n]);
  }
};

void matmul_reference(Context& ctx, const Matmul& p) {
  check(p);
  float* product = p.pre_gelu ? p.pre_gelu.f32() : p.c.f32();
  Product{.c = product,
          .a = p.a.f32(),
          .b = p.b.f32(),
          .bias = p.bias ? p.bias.f32() : nullptr,
          .addend = product,
          .M = p.c.rows(),
          .N = p.c.cols(),
          .K = p.transpose_a ? p.a.rows() : p.a.cols(),
          .ta = p.transpose_a,
          .tb = p.transpose_b,
          .alpha = p.alpha,
          .beta = p.beta}
      .run(ctx);
  if (p.pre_gelu) gelu_forward(ctx, {.y = p.c, .x = p.pre_gelu});
  if (p.gelu_input) gelu_backward(ctx, {.dx = p.c, .dy = p.c, .x = p.gelu_input});
  if (p.dbias) bias_backward(ctx, {.dbias = p.dbias, .dy = p.a, .accumulate = p.beta != 0});
}

void batched_matmul_reference(Context& ctx, const BatchedMatmul& p) {
  check(p);
  for (int64_t i = 0; i < p.c.shape[0]; ++i)
    Product{.c = p.c[i].f32(),
            .a = p.a[i].f32(),
            .b = p.b[i].f32(),
            .bias = nullptr,
            .addend = (p.addend ? p.addend : p.c)[i].f32(),
            .M = p.c.shape[1],
            .N = p.c.shape[2],
            .K = p.a.shape[p.transpose_a ? 1 : 2],
            .ta = p.transpose_a,
            .tb = p.transpose_b,
            .alpha = static_cast<float>(p.alpha),
            .beta = static_cast<float>(p.beta)}
        .run(ctx);
}
}  // namespace

std::vector<Variant> all_variants() {
  return {
    {.op = "matmul", .name = "reference", .where = Where::cpu, .function = matmul_reference},
        {.op = "batched_matmul",
         .name = "reference",
         .where = Where::cpu,
         .function = batched_matmul_reference},
#if HAVE_GPU_KERNELS
        {.op = "matmul", .name = "wgmma", .where = Where::gpu, .function = lab_gemm_wgmma},
#endif
  };
}
