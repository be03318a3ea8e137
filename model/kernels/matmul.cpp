#include "model/kernels/matmul.h"

#include <omp.h>
#include <oneapi/dnnl/dnnl.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "model/kernels/bias.h"
#include "model/kernels/blas.h"
#include "model/kernels/gelu.h"
#include "model/kernels/simd.h"

// oneDNN's sgemm on one thread runs at the speed of the machine for every shape that we have. Sharing one
// product among threads is what it does unevenly (on 2 threads 138 to 215 GFLOP/s depending on the shape). So
// we cut products into blocks ourselves, one thread to a block, and get 186 to 216.

namespace {
/// T: float, or double.
template <typename T>
struct Product {
  bool transpose_a, transpose_b;
  bool symmetric, drop_denormals;
  int64_t batch, M, N, K;
  T alpha, beta;
  const T *a, *b;
  const T* bias;    // may be null
  const T* addend;  // what beta scales; may be c
  T* c;
};

/// How the c of each matrix is cut.
struct Cut {
  enum class Along { rows, columns, triangle } along;
  int64_t blocks;  // of one matrix
};

/// Rows [m0, m1) and columns [n0, n1) of one matrix.
struct Block {
  int64_t matrix, m0, m1, n0, n1;
};

// Rows or columns of a block; thinner ones spend too much on packing the other operand.
constexpr int64_t kNarrowest = 128;

template <typename T>
Cut cut(const Product<T>& p, int64_t threads) {
  const int64_t triangle = (p.M + kNarrowest - 1) / kNarrowest;
  // Half of the work in blocks of falling size is faster as long as every thread gets as much as the largest.
  if (p.symmetric && triangle > 1 && p.batch * (triangle + 1) / 2 >= threads)
    return {Cut::Along::triangle, triangle};
  const bool by_columns = p.transpose_b && !p.transpose_a;
  const int64_t extent = by_columns ? p.N : p.M;
  int64_t blocks = threads / std::gcd(threads, p.batch);  // the fewest that share out evenly
  // A block of a symmetric c that is no triangle must be all of it, because the rest is mirrored from it.
  if (p.symmetric || extent / blocks < kNarrowest) blocks = 1;
  return {by_columns ? Cut::Along::columns : Cut::Along::rows, blocks};
}

template <typename T>
Block block_at(const Product<T>& p, const Cut& cut, int64_t index) {
  const int64_t matrix = index / cut.blocks, i = index % cut.blocks;
  const auto bound = [&](int64_t extent, int64_t k) {  // whole cache lines, so that threads never share one
    return k == cut.blocks ? extent : extent * k / cut.blocks / 16 * 16;
  };
  switch (cut.along) {
    case Cut::Along::rows:
      return {matrix, bound(p.M, i), bound(p.M, i + 1), 0, p.N};
    case Cut::Along::columns:
      return {matrix, 0, p.M, bound(p.N, i), bound(p.N, i + 1)};
    case Cut::Along::triangle:
      return {matrix, i * kNarrowest, p.M, i * kNarrowest, std::min(p.N, (i + 1) * kNarrowest)};
  }
  return {};
}

/// Makes c what sgemm is to add to, and returns sgemm's beta.
template <typename T>
T prepare(const Product<T>& p, const Block& block) {
  if (p.bias == nullptr && (p.beta == 0 || p.addend == p.c)) return p.beta;
  for (int64_t m = block.m0; m < block.m1; ++m) {
    const int64_t row = (block.matrix * p.M + m) * p.N;
    const T* addend = p.addend + row;
    T* c = p.c + row;
    if (p.bias == nullptr) {
#pragma omp simd
      for (int64_t n = block.n0; n < block.n1; ++n) c[n] = p.beta * addend[n];
    } else if (p.beta == 0) {
      std::copy(p.bias + block.n0, p.bias + block.n1, c + block.n0);
    } else {
#pragma omp simd
      for (int64_t n = block.n0; n < block.n1; ++n) c[n] = p.beta * addend[n] + p.bias[n];
    }
  }
  return 1;
}

/// Copies rows [i, ...) of columns [begin, end) across the diagonal, for all i below it.
template <typename T>
void mirror(T* c, int64_t n, int64_t begin, int64_t end) {
  constexpr int64_t kTile = 16;  // one or two cache lines wide: each line is read and written once
  T tile[kTile][kTile];
  for (int64_t i = begin; i < n; i += kTile) {
    const int64_t rows = std::min(kTile, n - i);
    for (int64_t j = begin; j < std::min(end, i + 1); j += kTile) {
      const int64_t cols = std::min(kTile, end - j);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < cols; ++k) tile[k][r] = c[(i + r) * n + j + k];
      for (int64_t k = 0; k < cols; ++k)
        for (int64_t r = i == j ? k : 0; r < rows; ++r) c[(j + k) * n + i + r] = tile[k][r];
    }
  }
}

/// While it lives, this thread takes denormal numbers for 0 and makes none, if it `drops` them. Some
/// processors take a hundred times as long for a sum with one: coupled Newton, whose matrices converge to I,
/// ran at a sixth of its speed.
class Denormals {
 public:
#ifdef __SSE__
  explicit Denormals(bool drops) {
    _mm_setcsr(drops ? before_ | kFlushToZero | kAreZero : before_);
  }
  ~Denormals() {
    _mm_setcsr(before_);
  }
  Denormals(const Denormals&) = delete;
  Denormals& operator=(const Denormals&) = delete;

 private:
  static constexpr unsigned kFlushToZero = 0x8000, kAreZero = 0x0040;  // results, operands
  const unsigned before_ = _mm_getcsr();
#else
  explicit Denormals(bool) {}
#endif
};

/// The product of matrices that both libraries compute; false when one fails.
bool gemm(char ta, char tb, int64_t M, int64_t N, int64_t K, float alpha, const float* a, int64_t lda,
          const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  return dnnl_sgemm(ta, tb, M, N, K, alpha, a, lda, b, ldb, beta, c, ldc) == dnnl_success;
}
bool gemm(char ta, char tb, int64_t M, int64_t N, int64_t K, double alpha, const double* a, int64_t lda,
          const double* b, int64_t ldb, double beta, double* c, int64_t ldc) {
  blas_dgemm(ta, tb, M, N, K, alpha, a, lda, b, ldb, beta, c, ldc);
  return true;
}

/// One block on as many threads as OpenMP says: one inside a parallel region.
template <typename T>
bool multiply_block(const Product<T>& p, const Block& block) {
  const T beta = prepare(p, block);
  const int64_t lda = p.transpose_a ? p.M : p.K, ldb = p.transpose_b ? p.K : p.N;
  const T* a = p.a + block.matrix * p.M * p.K + (p.transpose_a ? block.m0 : block.m0 * lda);
  const T* b = p.b + block.matrix * p.K * p.N + (p.transpose_b ? block.n0 * ldb : block.n0);
  T* c = p.c + block.matrix * p.M * p.N;
  const Denormals denormals(p.drop_denormals);
  const bool done =
      gemm(p.transpose_a ? 'T' : 'N', p.transpose_b ? 'T' : 'N', block.m1 - block.m0, block.n1 - block.n0,
           p.K, p.alpha, a, lda, b, ldb, beta, c + block.m0 * p.N + block.n0, p.N);
  if (p.symmetric) mirror(c, p.N, block.n0, block.n1);
  return done;
}

template <typename T>
void multiply(const Context& ctx, const Product<T>& p) {
  if (omp_get_max_threads() != ctx.threads) use_threads(ctx.threads);  // oneDNN follows OpenMP's setting
  const Cut how = cut(p, ctx.threads);
  const int64_t blocks = p.batch * how.blocks;
  int failures = 0;
  if (blocks < ctx.threads) {  // small products or many threads: let oneDNN share each one out
    for (int64_t i = 0; i < blocks; ++i) failures += !multiply_block(p, block_at(p, how, i));
  } else {
    // A block's result does not depend on the thread that takes it.
#pragma omp parallel for num_threads(ctx.threads) schedule(dynamic, 1) reduction(+ : failures)
    for (int64_t i = 0; i < blocks; ++i) failures += !multiply_block(p, block_at(p, how, i));
  }
  if (failures > 0) throw std::runtime_error("matmul: oneDNN's sgemm failed, probably out of memory");
}

void check_sizes(const char* op, const Shape& c, const Shape& a, const Shape& b, bool transpose_a,
                 bool transpose_b) {
  const Shape left = transpose_a ? Shape{a[1], a[0]} : a, right = transpose_b ? Shape{b[1], b[0]} : b;
  if (left[1] != right[0] || c[0] != left[0] || c[1] != right[1])
    throw ShapeError(std::string(op) + ": got c " + c.str() + ", op(a) " + left.str() + ", op(b) " +
                     right.str() + ", need (M, N), (M, K), (K, N)");
}

void check_dtypes(const char* op, const Tensor& c, const Tensor& a, const Tensor& b, bool double_too) {
  if (double_too && c.dtype == DType::f64 && a.dtype == DType::f64 && b.dtype == DType::f64) return;
  const bool inputs = a.dtype == b.dtype && (a.dtype == DType::f32 || a.dtype == DType::bf16);
  if (!inputs || (c.dtype != DType::f32 && c.dtype != a.dtype))
    throw ShapeError(std::string(op) + ": got c " + dtype_name(c.dtype) + ", a " + dtype_name(a.dtype) +
                     ", b " + dtype_name(b.dtype) + ", need a and b both f32 or both bf16, c f32 or theirs" +
                     (double_too ? ", or all f64" : ""));
}
}  // namespace

void check(const Matmul& args) {
  const auto matrix = [](const Tensor& t) { return Shape{t.rows(), t.cols()}; };
  check_sizes("matmul", matrix(args.c), matrix(args.a), matrix(args.b), args.transpose_a, args.transpose_b);
  check_dtypes("matmul", args.c, args.a, args.b, /*double_too=*/false);
  for (const Tensor& tensor : {args.bias, args.pre_gelu, args.gelu_input})
    expect(!tensor || tensor.dtype == args.c.dtype,
           "matmul: bias, pre_gelu and gelu_input need the dtype of c");
  expect((args.pre_gelu ? 1 : 0) + (args.gelu_input ? 1 : 0) + (args.dbias ? 1 : 0) <= 1,
         "matmul: one of pre_gelu, gelu_input and dbias at a time");
  expect(!(args.pre_gelu || args.gelu_input) || args.beta == 0, "matmul: a GELU needs beta = 0");
  if (args.bias) {
    expect_shape(args.bias, {args.c.cols()}, "matmul: bias");
    expect(!args.gelu_input && !args.dbias, "matmul: a bias goes with pre_gelu only");
  }
  if (args.pre_gelu) {
    expect_shape(args.pre_gelu, args.c.shape, "matmul: pre_gelu");
    expect(args.pre_gelu.data != args.c.data, "matmul: pre_gelu must not be c");
  }
  if (args.gelu_input) expect_shape(args.gelu_input, args.c.shape, "matmul: gelu_input");
  if (args.dbias) {
    expect_shape(args.dbias, {args.c.rows()}, "matmul: dbias");
    expect(args.transpose_a && args.dbias.dtype == DType::f32, "matmul: dbias is f32 and needs transpose_a");
  }
}

void check(const BatchedMatmul& args) {
  expect(args.c.shape.rank() == 3 && args.a.shape.rank() == 3 && args.b.shape.rank() == 3,
         "batched_matmul: tensors must be (batch, rows, cols)");
  const auto matrix = [](const Tensor& t) { return Shape{t.shape[1], t.shape[2]}; };
  check_sizes("batched_matmul", matrix(args.c), matrix(args.a), matrix(args.b), args.transpose_a,
              args.transpose_b);
  check_dtypes("batched_matmul", args.c, args.a, args.b, /*double_too=*/true);
  expect(args.a.shape[0] == args.c.shape[0] && args.b.shape[0] == args.c.shape[0],
         "batched_matmul: tensors need the same batch");
  expect(!args.symmetric || args.c.shape[1] == args.c.shape[2],
         "batched_matmul: a symmetric c must be square");
  if (args.addend) {
    expect_shape(args.addend, args.c.shape, "batched_matmul: addend");
    expect(args.addend.dtype == args.c.dtype, "batched_matmul: addend needs the dtype of c");
  }
}

int64_t dbias_scratch_bytes(const Context& ctx, int64_t K, int64_t M) {
  const int64_t sums = ctx.where == Where::gpu ? M * int64_t{sizeof(float)} : 0;
  return std::max(sums, bias_backward_scratch_bytes(ctx, K, M));
}

// The epilogues are the operations that they replace, one after the other: c is in the cache or not, and
// oneDNN's sgemm takes no more than this anyway.
void cpu::matmul(Context& ctx, const Matmul& args) {
  float* c = args.pre_gelu ? args.pre_gelu.f32() : args.c.f32();
  multiply<float>(ctx, {.transpose_a = args.transpose_a,
                        .transpose_b = args.transpose_b,
                        .symmetric = false,
                        .drop_denormals = true,
                        .batch = 1,
                        .M = args.c.rows(),
                        .N = args.c.cols(),
                        .K = args.transpose_a ? args.a.rows() : args.a.cols(),
                        .alpha = args.alpha,
                        .beta = args.beta,
                        .a = args.a.f32(),
                        .b = args.b.f32(),
                        .bias = args.bias ? args.bias.f32() : nullptr,
                        .addend = c,
                        .c = c});
  if (args.pre_gelu) ::gelu_forward(ctx, {.y = args.c, .x = args.pre_gelu});
  if (args.gelu_input) ::gelu_backward(ctx, {.dx = args.c, .dy = args.c, .x = args.gelu_input});
  if (args.dbias) ::bias_backward(ctx, {.dbias = args.dbias, .dy = args.a, .accumulate = args.beta != 0});
}

void cpu::batched_matmul(Context& ctx, const BatchedMatmul& args) {
  for_real_type(args.c.dtype, [&]<typename T>(T) {
    T* c = reals_of<T>(args.c);
    multiply<T>(ctx, {.transpose_a = args.transpose_a,
                      .transpose_b = args.transpose_b,
                      .symmetric = args.symmetric,
                      .drop_denormals = args.drop_denormals,
                      .batch = args.c.shape[0],
                      .M = args.c.shape[1],
                      .N = args.c.shape[2],
                      .K = args.transpose_a ? args.a.shape[1] : args.a.shape[2],
                      .alpha = static_cast<T>(args.alpha),
                      .beta = static_cast<T>(args.beta),
                      .a = reals_of<T>(args.a),
                      .b = reals_of<T>(args.b),
                      .bias = nullptr,
                      .addend = args.addend ? reals_of<T>(args.addend) : c,
                      .c = c});
  });
}
