// Products of lists of matrices, on the CPU and on a GPU or in the executor.
#include "optim/products.h"

#include <gtest/gtest.h>

#include "model/kernels/profile.h"
#include "tests/optim_fixture.h"

namespace {
/// Matrices (rows, cols) in one block of memory, some of them one after the other, some apart.
struct Scattered {
  Scattered(Context& ctx, std::span<const int64_t> places, int64_t rows, int64_t cols, uint32_t seed)
      : block(ctx, random_matrix(16 * rows, cols, seed)) {
    for (const int64_t place : places) list.push_back(block.tensor().slice(place * rows, rows));
  }
  There block;
  std::vector<Tensor> list;
};

Matrix here(Context& ctx, const Tensor& m) {
  return download<float>(ctx, m);
}
}  // namespace

TEST(Products, AreThoseOfTheirMatricesWhereverTheyLie) {
  for (const UseDevice use : both_devices()) {
    Context ctx;
    use(ctx);
    ctx.scratch.reserve(1 << 16);
    const std::vector<int64_t> one_run{2, 3, 4, 5, 6}, two_runs{0, 1, 7, 8, 9}, apart{1, 3, 9, 5, 7};
    for (const auto& [a_at, b_at, calls] :
         {std::tuple{&one_run, &one_run, 1}, {&one_run, &two_runs, 2}, {&two_runs, &apart, 5}})
      for (const bool transpose : {false, true}) {
        const int64_t M = 5, N = 4, K = 3;
        Scattered c(ctx, one_run, M, N, 1), b(ctx, *b_at, K, N, 3);
        Scattered a(ctx, *a_at, transpose ? K : M, transpose ? M : K, 2);
        std::vector<Matrix> want;
        for (size_t i = 0; i < 5; ++i) {
          const Matrix left = here(ctx, a.list[i]);
          Matrix sum = here(ctx, c.list[i]);
          const Matrix made = product(transpose ? left.transposed() : left, here(ctx, b.list[i]));
          for (size_t k = 0; k < sum.data.size(); ++k) sum.data[k] = 0.5f * sum.data[k] - 2 * made.data[k];
          want.push_back(sum);
        }
        Profile profile;
        ctx.profile = &profile;
        products(ctx,
                 {.c = c.list, .a = a.list, .b = b.list, .transpose_a = transpose, .alpha = -2, .beta = 0.5});
        ctx.profile = nullptr;
        for (size_t i = 0; i < 5; ++i) EXPECT_LT(deviation(here(ctx, c.list[i]), want[i]), 1e-5) << i;
        ASSERT_EQ(profile.rows().size(), 1u);
        EXPECT_EQ(profile.rows()[0].calls, calls);  // as few batches as can be
      }
    Scattered some(ctx, one_run, 2, 2, 4);
    const std::span<const Tensor> all = some.list;
    EXPECT_THROW(products(ctx, {.c = all, .a = all.first(3), .b = all}), ShapeError);
    products(ctx, {.c = {}, .a = {}, .b = {}});
  }
}

TEST(Products, Stacks) {
  Context ctx;
  std::vector<float> memory(64);
  const auto matrix = [&](int64_t start, int64_t rows) { return Tensor(memory.data() + start, {rows, 2}); };
  const std::vector<Tensor> run{matrix(0, 3), matrix(6, 3), matrix(12, 3)};
  EXPECT_EQ(lie_together(run), 3u);
  EXPECT_EQ(stacked(run).shape, (Shape{3, 3, 2}));
  EXPECT_EQ(stacked(run).data, memory.data());
  EXPECT_EQ(matrices_of(stacked(run))[2].data, run[2].data);
  EXPECT_EQ(lie_together({}), 0u);
  EXPECT_FALSE(stacked({}));
  for (const std::vector<Tensor>& broken :
       {std::vector<Tensor>{run[0], run[2]},
        {run[1], run[0]},
        {run[0], matrix(6, 2)},
        {run[0], Tensor(reinterpret_cast<int32_t*>(memory.data() + 6), {3, 2})}}) {
    EXPECT_EQ(lie_together(broken), 1u);
    EXPECT_FALSE(stacked(broken));
  }
}
