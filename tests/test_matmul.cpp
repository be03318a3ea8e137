// What op_cases.h does not say about matrix products on the CPU; and the file of plans, which is host code.
#include <gtest/gtest.h>

#include "model/kernels/gemm_cache.h"
#include "model/kernels/matmul.h"
#include "tests/cases/matmul.h"
#include "tests/op_run.h"
#include "tests/temporary_folder.h"

namespace {
std::vector<std::string> ops_of(const OpCase& op_case) {
  Context ctx;
  use_cpu(ctx, 2);
  Profile profile;
  ctx.profile = &profile;
  run(ctx, op_case, random_values(op_case));
  std::vector<std::string> ops;
  for (const Profile::Row& row : profile.rows()) ops.push_back(row.op);
  std::ranges::sort(ops);
  return ops;
}

TEST(Matmul, EpiloguesKeepTheirRowsInTheProfile) {
  using Ops = std::vector<std::string>;
  EXPECT_EQ(ops_of(matmul_gelu_case(5, 8, 6, true)), (Ops{"gelu_forward", "matmul"}));
  EXPECT_EQ(ops_of(matmul_dgelu_case(5, 8, 6)), (Ops{"gelu_backward", "matmul"}));
  EXPECT_EQ(ops_of(weight_gradient_case(5, 8, 6, true, true)), (Ops{"bias_backward", "matmul"}));
  EXPECT_EQ(ops_of(weight_gradient_case(5, 8, 6, true, false)), Ops{"matmul"});
}

TEST(Matmul, ArgumentsThatDoNotGoTogetherAreErrors) {
  Context ctx;
  use_cpu(ctx, 1);
  std::vector<float> memory(600);
  const auto square = [&](int64_t at) { return Tensor(memory.data() + 16 * at, Shape{4, 4}); };
  const Tensor c = square(0), a = square(1), b = square(2), h = square(3), row = square(4)[0];
  const auto wrong = [&](const Matmul& args) { EXPECT_THROW(matmul(ctx, args), ShapeError); };
  wrong({.c = c, .a = a, .b = b, .pre_gelu = c});                    // one memory for two results
  wrong({.c = c, .a = a, .b = b, .pre_gelu = h, .gelu_input = h});   // two epilogues
  wrong({.c = c, .a = a, .b = b, .pre_gelu = h, .beta = 1});         // nothing to add to
  wrong({.c = c, .a = a, .b = b, .bias = row, .gelu_input = h});     // no such formula
  wrong({.c = c, .a = a, .b = b, .dbias = row});                     // rows of a, not columns
  wrong({.c = c, .a = a, .b = b, .dbias = h, .transpose_a = true});  // a matrix
  wrong({.c = c, .a = a, .b = b, .pre_gelu = h.view({2, 8})});       // another shape
  const Tensor half(reinterpret_cast<Bf16*>(memory.data() + 128), Shape{4, 4});
  wrong({.c = c, .a = half, .b = b});
  wrong({.c = half, .a = a, .b = b});
  wrong({.c = c, .a = a, .b = b, .gelu_input = half});
  wrong({.c = half, .a = half, .b = half});  // the CPU computes in f32
  EXPECT_THROW(batched_matmul(ctx, {.c = c.view({1, 4, 4}),
                                    .a = a.view({1, 4, 4}),
                                    .b = b.view({1, 4, 4}),
                                    .addend = half.view({1, 4, 4}),
                                    .beta = 1}),
               ShapeError);
  matmul(ctx, {.c = c, .a = a, .b = b, .dbias = row, .transpose_a = true});
}

// Gradients of 1e-40 have a direction: batches keep denormal numbers unless they are told that none matters.
TEST(Matmul, BatchesKeepDenormalNumbers) {
  for (const int threads : {1, 2}) {
    Context ctx;
    use_cpu(ctx, threads);
    constexpr int64_t n = 160;
    std::vector<float> tiny(2 * n * n, 1e-40f), one(2 * n * n, 0.0f), product(2 * n * n);
    for (int64_t i = 0; i < 2; ++i)
      for (int64_t k = 0; k < n; ++k) one[static_cast<size_t>((i * n + k) * n + k)] = 1;
    const Shape batch{2, n, n};
    BatchedMatmul args{.c = {product.data(), batch}, .a = {tiny.data(), batch}, .b = {one.data(), batch}};
    batched_matmul(ctx, args);
    EXPECT_EQ(product, tiny);
    args.drop_denormals = true;
    batched_matmul(ctx, args);
    for (const float x : product) ASSERT_TRUE(x == 0 || x == 1e-40f);
    batched_matmul(ctx, {.c = args.c, .a = args.a, .b = args.b});  // the thread is as it was
    EXPECT_EQ(product, tiny);
  }
}

class GemmCache : public testing::Test {
 protected:
  /// What `action` writes to standard error.
  template <typename Action>
  static std::string said(Action&& action) {
    testing::internal::CaptureStderr();
    action();
    return testing::internal::GetCapturedStderr();
  }
  const GemmPlans plans_{{"M=1 N=2", {.fused = true, .algorithm = {1, 0xfedcba9876543210u, 0, ~uint64_t{0}}}},
                         {"M=3 N=4", {.fused = false}}};
  TemporaryFolder folder_;
};

TEST_F(GemmCache, GivesBackWhatItWasGiven) {
  const std::string path = folder_.path("a/b/gemm.json");
  EXPECT_EQ(said([&] {
              EXPECT_TRUE(load_gemm_plans(path, "GPU", "lib-1").empty());  // no file yet: nothing to say
              EXPECT_TRUE(save_gemm_plans(path, "GPU", "lib-1", plans_));
              EXPECT_EQ(load_gemm_plans(path, "GPU", "lib-1"), plans_);
            }),
            "");
  int files = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder_.path("a/b"))) ++files;
  EXPECT_EQ(files, 1) << "a temporary file is left";
}

TEST_F(GemmCache, KeepsWhatOtherRunsFoundMeanwhile) {
  const std::string path = folder_.path("gemm.json");
  const GemmPlan other{.fused = true, .algorithm = {7}};
  save_gemm_plans(path, "GPU", "lib-1", {{"M=9", other}, {"M=3 N=4", other}});
  save_gemm_plans(path, "GPU", "lib-1", plans_);
  GemmPlans both = plans_;
  both["M=9"] = other;
  EXPECT_EQ(load_gemm_plans(path, "GPU", "lib-1"), both);
}

TEST_F(GemmCache, PassesOverFilesThatAreForeignOrBroken) {
  const std::string path = folder_.path("gemm.json");
  const auto is_passed_over = [&](const std::string& gpu, const std::string& library) {
    const std::string words = said([&] { EXPECT_TRUE(load_gemm_plans(path, gpu, library).empty()); });
    EXPECT_EQ(std::ranges::count(words, '\n'), 1) << words;
    EXPECT_NE(words.find(path), std::string::npos) << words;
  };
  save_gemm_plans(path, "GPU", "lib-1", plans_);
  is_passed_over("another GPU", "lib-1");
  is_passed_over("GPU", "lib-2");
  const std::string good = folder_.read("gemm.json");
  for (const std::string& bytes :
       {std::string(), good.substr(0, good.size() / 2), std::string("[]"), std::string("\x80\xff"),
        std::string(good).replace(good.find("fedcba"), 6, "fedcbx"),
        std::string(good).replace(good.find("fedcba"), 6, "")}) {
    folder_.write("gemm.json", bytes);
    is_passed_over("GPU", "lib-1");
  }
  EXPECT_TRUE(save_gemm_plans(path, "GPU", "lib-1", plans_));  // replaced
  EXPECT_EQ(load_gemm_plans(path, "GPU", "lib-1"), plans_);
}

TEST_F(GemmCache, SaysSoWhenItCannotWrite) {
  folder_.write("file", "");
  const std::string words =
      said([&] { EXPECT_FALSE(save_gemm_plans(folder_.path("file/gemm.json"), "GPU", "lib-1", plans_)); });
  EXPECT_EQ(std::ranges::count(words, '\n'), 1) << words;
}
}  // namespace
