// Matrix products on a GPU beyond op_cases.h: epilogues fused and apart, layouts with gaps, and how plans are
// chosen and kept. In the executor the library is dev/cuda_on_cpu/gemm_host.cpp.
#include <map>
#include <optional>
#include <random>

#include "model/kernels/gemm.h"
#include "tests/cases/matmul.h"
#include "tests/op_run.h"
#include "tests/temporary_folder.h"

namespace {
using Epilogues = GemmOptions::Epilogues;

/// What a Watched library does and has done.
struct Script {
  int algorithms = 1;                                    // that it suggests
  std::function<double(const Gemm&, int)> seconds = {};  // an algorithm's time; absent: none
  std::function<bool(const Gemm&)> suggests = {};        // absent: everything that the real one can do
  std::function<bool(int)> fails = {};                   // algorithms that are suggested and then fail
  bool capturing = false;

  std::vector<int> run = {};  // algorithms of the products, timed ones included
  int fused = 0;              // products with an epilogue
  int timed = 0;
};

/// The library that this binary links, under other names: algorithms are numbers, times are scripted.
class Watched final : public GemmLibrary {
 public:
  Watched(Context& ctx, Script& script) : real_(gpu::open_gemm_library(*ctx.device)), script_(script) {}
  std::string name() const override { return "watched"; }
  std::vector<GemmAlgorithm> algorithms(const Gemm& g, int most) override {
    if ((script_.suggests && !script_.suggests(g)) || real_->algorithms(g, 1).empty()) return {};
    std::vector<GemmAlgorithm> list;
    for (int i = 0; i < std::min(most, script_.algorithms); ++i) list.push_back({static_cast<uint64_t>(i)});
    return list;
  }
  bool accepts(const Gemm& g, const GemmAlgorithm& algorithm) override {
    return algorithm[0] < static_cast<uint64_t>(script_.algorithms) && !algorithms(g, 1).empty();
  }
  void run(const Gemm& g, const GemmAlgorithm& algorithm) override {
    const int number = static_cast<int>(algorithm[0]);
    if (script_.fails && script_.fails(number)) throw std::runtime_error("fails");
    real_->run(g, real_->algorithms(g, 1).at(0));
    script_.run.push_back(number);
    script_.fused += g.epilogue != GemmEpilogue::none ? 1 : 0;
    if (script_.seconds) spent_ += script_.seconds(g, number);
  }
  double time(const std::function<void()>& body) override {
    ++script_.timed;
    spent_ = 0;
    body();
    return spent_;
  }
  bool capturing() const override { return script_.capturing; }

 private:
  std::unique_ptr<GemmLibrary> real_;
  Script& script_;
  double spent_ = 0;
};

struct Gpu {
  Context ctx;
  explicit Gpu(DType dtype = DType::f32) { use_gpu(ctx, 0, dtype); }
  Gpu(DType dtype, Script& script, const GemmOptions& options = {}) : Gpu(dtype) {
    gpu::use_gemm_library(ctx, std::make_unique<Watched>(ctx, script));
    gpu::set_gemm_options(ctx, options);
  }
};

/// The operands that activations are, as bf16.
OpCase in_half(OpCase op_case) {
  for (Operand& operand : op_case.operands)
    if (operand.name != "dbias" && !(operand.name == "c" && op_case.name.find("f32") != std::string::npos))
      operand.half = true;
  return op_case;
}

Values inputs_of(const OpCase& op_case) {
  Values values = random_values(op_case);
  for (const Operand& operand : op_case.operands)
    if (operand.half)
      for (double& x : values[operand.name]) x = to_float(to_bf16(static_cast<float>(x)));
  return values;
}

void expect_right(Context& ctx, const OpCase& op_case, double tolerance, const std::string& how) {
  const Values before = inputs_of(op_case);
  Values want = before;
  op_case.oracle(want);
  expect_outputs(op_case, run(ctx, op_case, before), want, tolerance, op_case.name + ", " + how);
}

/// All epilogues for products of one size, which should be a multiple of 8: then libraries can fuse them.
std::vector<OpCase> epilogue_cases(int64_t M = 16, int64_t N = 40, int64_t K = 24) {
  std::vector<OpCase> cases;
  for (bool bias : {false, true}) cases.push_back(in_half(matmul_gelu_case(M, N, K, bias)));
  cases.push_back(in_half(matmul_dgelu_case(M, N, K)));
  for (bool accumulate : {false, true})
    cases.push_back(in_half(weight_gradient_case(K, M, N, accumulate, true)));
  return cases;
}

constexpr double kRounding = 1.0 / 256;  // to bf16

TEST(GpuMatmul, EpiloguesAreRightFusedAndApart) {
  std::vector<OpCase> cases;
  for (const auto& [M, N, K] : {std::array<int64_t, 3>{16, 40, 24}, {136, 72, 32}, {64, 64, 64}})
    std::ranges::move(epilogue_cases(M, N, K), std::back_inserter(cases));
  for (const OpCase& op_case : cases)
    for (Epilogues how : {Epilogues::fused, Epilogues::apart}) {
      Script script;
      Gpu gpu(DType::bf16, script, {.epilogues = how});
      // Apart, what the second kernel reads was rounded by the first. cuBLASLt's tanh is good to 2^-11.
      const bool fused = how == Epilogues::fused;
      expect_right(gpu.ctx, op_case, op_case.tolerance + (fused ? 1.5 : 2.1) * kRounding,
                   fused ? "fused" : "apart");
      EXPECT_EQ(script.run.size(), 1u);
      EXPECT_EQ(script.fused, fused ? 1 : 0) << op_case.name;
    }
}

TEST(GpuMatmul, EpiloguesThatTheLibraryCannotDoAreApart) {
  for (const auto& [op_case, dtype] :
       {std::pair{matmul_gelu_case(9, 40, 24, true), DType::f32},  // its accuracy is not for f32
        {matmul_dgelu_case(9, 40, 24), DType::f32},
        {in_half(matmul_gelu_case(9, 41, 24, true)), DType::bf16},  // aux wants rows of 8
        {in_half(matmul_dgelu_case(9, 41, 24)), DType::bf16}}) {
    Script script;
    Gpu gpu(dtype, script, {.epilogues = Epilogues::fused});
    expect_right(gpu.ctx, op_case, op_case.tolerance + (dtype == DType::bf16 ? 2.1 * kRounding : 0), "");
    EXPECT_EQ(script.fused, 0) << op_case.name;
  }
}

TEST(GpuMatmul, NoEpilogueIsFusedWithoutMeasuring) {
  Script script;
  Gpu gpu(DType::bf16, script);
  const OpCase op_case = in_half(matmul_gelu_case(9, 40, 24, true));
  expect_right(gpu.ctx, op_case, op_case.tolerance + 2.1 * kRounding, "by default");
  EXPECT_EQ(script.fused, 0);
  EXPECT_EQ(script.timed, 0);
}

TEST(GpuMatmul, ABiasThatTheLibraryRefusesIsAddedByOurKernel) {
  for (DType dtype : {DType::f32, DType::bf16}) {
    Script script;
    script.suggests = [](const Gemm& g) { return g.bias == nullptr; };
    Gpu gpu(dtype, script);
    for (const OpCase& op_case :
         {matmul_case(7, 33, 65, kNT, true), matmul_case(130, 67, 9, kTN, true, 2, 0.5f)})
      expect_right(gpu.ctx, op_case, op_case.tolerance + (dtype == DType::bf16 ? 2.1 * kRounding : 0), "");
    EXPECT_EQ(script.run.size(), 2u);
  }
}

TEST(GpuMatmul, APolynomialOfNewtonSchulzIsOneProduct) {
  Script script;
  Gpu gpu(DType::bf16, script);
  const OpCase op_case = batched_matmul_case(3, 40, 40, Symmetry::square);
  expect_right(gpu.ctx, op_case, op_case.tolerance + kRounding, "");
  EXPECT_EQ(script.run.size(), 1u);
}

/// A product of matrices inside larger ones, c apart from d; nothing but d may change.
void check_layout(DType in, DType out, int64_t batch, bool ta, bool tb) {
  Gpu gpu(in == DType::bf16 ? DType::bf16 : DType::f32);
  const int64_t M = 6, N = 16, K = 8, ld = 24, rows = 20;  // room around each matrix
  const Shape shape{batch, rows, ld};
  Tensor a, b, c, d;
  Arena arena("test");
  arena.add(&a, in, shape);
  arena.add(&b, in, shape);
  arena.add(&c, out, shape);
  arena.add(&d, out, shape);
  arena.allocate(gpu.ctx);
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  Values v;
  for (const auto& [name, tensor] : {std::pair{"a", a}, {"b", b}, {"c", c}, {"d", d}}) {
    for (int64_t i = 0; i < shape.size(); ++i) v[name].push_back(to_float(to_bf16(normal(random))));
    put(gpu.ctx, tensor, v[name]);
  }
  const auto matrix = [&](const Tensor& t) {
    return GemmMatrix{.data = t.data, .dtype = t.dtype, .ld = ld, .stride = rows * ld};
  };
  gpu::gemm(gpu.ctx, {.batch = batch,
                      .M = M,
                      .N = N,
                      .K = K,
                      .transpose_a = ta,
                      .transpose_b = tb,
                      .a = matrix(a),
                      .b = matrix(b),
                      .c = matrix(c),
                      .d = matrix(d),
                      .alpha = -0.5f,
                      .beta = 2});
  for (int64_t i = 0; i < batch; ++i)
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < N; ++n) {
        const int64_t base = i * rows * ld;
        double sum = 0;
        for (int64_t k = 0; k < K; ++k)
          sum +=
              v["a"][base + (ta ? k * ld + m : m * ld + k)] * v["b"][base + (tb ? n * ld + k : k * ld + n)];
        v["d"][base + m * ld + n] = -0.5 * sum + 2 * v["c"][base + m * ld + n];
      }
  const double tolerance = out == DType::bf16 ? kRounding : out == DType::f64 ? 1e-14 : 1e-6;
  for (const auto& [name, tensor] : {std::pair{"a", a}, {"b", b}, {"c", c}, {"d", d}}) {
    const std::vector<double> got = get(gpu.ctx, tensor);
    for (size_t i = 0; i < got.size(); ++i)
      ASSERT_NEAR(got[i], v[name][i], tolerance * (2 + std::abs(v[name][i]))) << name << " at " << i;
  }
}

TEST(GpuMatmul, MatricesMayLieInsideLargerOnes) {
  for (int64_t batch : {1, 3})
    for (bool ta : {false, true})
      for (bool tb : {false, true}) {
        check_layout(DType::f32, DType::f32, batch, ta, tb);
        check_layout(DType::bf16, DType::bf16, batch, ta, tb);
        check_layout(DType::bf16, DType::f32, batch, ta, tb);
        check_layout(DType::f64, DType::f64, batch, ta, tb);
      }
}

TEST(GpuMatmul, WhatCannotBeAProductIsAnError) {
  Gpu gpu;
  std::vector<float> memory(100);  // never touched
  const GemmMatrix good{.data = memory.data(), .dtype = DType::f32, .ld = 4, .stride = 16};
  Gemm product{.M = 4, .N = 4, .K = 4, .a = good, .b = good, .d = good};
  const auto wrong = [&](auto&& change) {
    Gemm changed = product;
    change(changed);
    EXPECT_THROW(gpu::gemm(gpu.ctx, changed), ShapeError);
  };
  wrong([](Gemm& g) { g.a.data = nullptr; });
  wrong([](Gemm& g) { g.b.ld = 3; });
  wrong([](Gemm& g) { g.d.stride = 15, g.batch = 2; });
  wrong([](Gemm& g) { g.K = 0; });
  wrong([](Gemm& g) { g.beta = 1; });  // no c
  wrong([](Gemm& g) { g.b.dtype = DType::bf16; });
  wrong([](Gemm& g) { g.a.dtype = g.b.dtype = DType::f64; });  // to f32
  const auto doubles = [](Gemm& g) { g.a.dtype = g.b.dtype = g.d.dtype = DType::f64; };
  wrong([&](Gemm& g) { doubles(g), g.bias = memory.data(); });
  wrong([&](Gemm& g) { doubles(g), g.epilogue = GemmEpilogue::gelu, g.aux = memory.data(); });
  wrong([&](Gemm& g) { g.beta = 1, g.c = good, g.c.dtype = DType::bf16; });
  wrong([](Gemm& g) { g.epilogue = GemmEpilogue::gelu; });  // no aux
  wrong([](Gemm& g) { g.epilogue = GemmEpilogue::gelu, g.aux = g.d.data; });
  wrong([&](Gemm& g) { g.epilogue = GemmEpilogue::dbias, g.dbias = memory.data(); });  // a not transposed
  wrong([&](Gemm& g) { g.bias = memory.data(), g.batch = 2; });
}

// --------------------------------------------------------------------------------------------------- plans

class GpuPlans : public testing::Test {
 protected:
  /// Runs the case with a new device, plans kept in the file.
  void run_once(Script& script, const OpCase& op_case, Epilogues epilogues = Epilogues::measured) {
    Gpu gpu(DType::bf16, script, {.cache_file = path_, .epilogues = epilogues});
    expect_right(gpu.ctx, op_case, op_case.tolerance + 2.1 * kRounding, "");
  }
  TemporaryFolder folder_;
  std::string path_ = folder_.path("gemm.json");
  OpCase plain_ = matmul_case(9, 40, 24, kNT);
};

TEST_F(GpuPlans, TheFastestAlgorithmIsChosenAndTheFirstAmongEquals) {
  const std::vector<double> seconds{5e-3, 3.02e-3, 3e-3, 2e-3, 9e-3};
  Script script{.algorithms = 5};
  script.seconds = [&](const Gemm&, int algorithm) { return seconds[static_cast<size_t>(algorithm)]; };
  script.fails = [](int algorithm) { return algorithm == 3; };
  run_once(script, plain_);
  EXPECT_EQ(script.run.back(), 1);
  EXPECT_GT(script.timed, 0);
}

TEST_F(GpuPlans, AnErrorOfEveryAlgorithmIsReported) {
  Script script{.algorithms = 2};
  script.fails = [](int) { return true; };
  Gpu gpu(DType::bf16, script, {.cache_file = path_});
  try {
    run(gpu.ctx, plain_, inputs_of(plain_));
    ADD_FAILURE() << "no error";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("(fails)"), std::string::npos) << error.what();
  }
  EXPECT_FALSE(std::filesystem::exists(path_));
}

TEST_F(GpuPlans, TheNextRunChoosesTheSameWithoutTiming) {
  for (const OpCase& op_case : epilogue_cases())
    for (bool fused_wins : {false, true}) {
      std::filesystem::remove(path_);
      const auto seconds = [=](const Gemm& g, int algorithm) {
        const bool fused = g.epilogue != GemmEpilogue::none;
        return (fused == fused_wins ? 1e-3 : 2e-3) / (1 + algorithm);
      };
      Script first{.algorithms = 2, .seconds = seconds};
      run_once(first, op_case);
      EXPECT_GT(first.timed, 0);
      EXPECT_EQ(first.run.back(), 1);
      Script second{.algorithms = 2, .seconds = seconds};
      run_once(second, op_case);
      EXPECT_EQ(second.timed, 0);
      EXPECT_EQ(second.run, std::vector<int>{1});
      EXPECT_EQ(second.fused, fused_wins ? 1 : 0) << op_case.name;
    }
}

TEST_F(GpuPlans, AnAlgorithmThatTheLibraryNoLongerAcceptsIsChosenAnew) {
  Script first{.algorithms = 3};
  first.seconds = [](const Gemm&, int algorithm) { return 1e-3 / (1 + algorithm); };
  run_once(first, plain_);
  EXPECT_EQ(first.run.back(), 2);
  Script second{.algorithms = 2, .seconds = first.seconds};
  run_once(second, plain_);
  EXPECT_GT(second.timed, 0);
  EXPECT_EQ(second.run.back(), 1);
}

TEST_F(GpuPlans, WhereAllFusedAlgorithmsFailTheEpilogueIsApart) {
  for (const OpCase& op_case : epilogue_cases()) {
    Script script;
    script.suggests = [](const Gemm& g) { return g.epilogue == GemmEpilogue::none; };
    run_once(script, op_case);
    EXPECT_EQ(script.fused, 0);
  }
}

TEST_F(GpuPlans, AProductThatNobodyCanDoIsOneClearError) {
  Script script;
  script.suggests = [](const Gemm&) { return false; };
  for (const std::string& path : {std::string(), path_}) {
    Gpu gpu(DType::bf16, script, {.cache_file = path});
    try {
      run(gpu.ctx, plain_, inputs_of(plain_));
      ADD_FAILURE() << "no error";
    } catch (const std::runtime_error& error) {
      EXPECT_NE(std::string(error.what()).find("M=9 N=40 K=24"), std::string::npos) << error.what();
    }
  }
}

TEST_F(GpuPlans, TimingDisturbsNoResults) {
  // Each product is run many times before its result is looked at; accumulated ones must be added once.
  Script script{.algorithms = 4};
  script.seconds = [](const Gemm&, int) { return 1e-6; };
  for (const OpCase& op_case : epilogue_cases()) run_once(script, op_case);
  for (float beta : {0.0f, 0.5f}) run_once(script, matmul_case(33, 17, 65, kTN, true, 2, beta));
  run_once(script, batched_matmul_case(3, 40, 40, Symmetry::square));
  run_once(script, batched_matmul_case(3, 9, 17, Symmetry::none, kTT));
  EXPECT_GT(script.timed, 100);
}

TEST_F(GpuPlans, TimingIsNotInTheProfile) {
  Script script{.algorithms = 4};
  script.seconds = [](const Gemm&, int) { return 1e-6; };
  const OpCase op_case = in_half(matmul_gelu_case(9, 40, 24, true));
  Gpu gpu(DType::bf16, script, {.cache_file = path_});
  Profile profile;
  gpu.ctx.profile = &profile;
  run(gpu.ctx, op_case, inputs_of(op_case));
  for (const Profile::Row& row : profile.rows()) EXPECT_EQ(row.calls, 1) << row.op;
  EXPECT_EQ(profile.rows().size(), 2u);  // the kernel and the product
}

TEST_F(GpuPlans, NothingIsTimedOrKeptDuringACapture) {
  Script script{.algorithms = 2};
  script.seconds = [](const Gemm&, int algorithm) { return 1e-3 / (1 + algorithm); };
  script.capturing = true;
  run_once(script, plain_);
  EXPECT_EQ(script.timed, 0);
  EXPECT_EQ(script.run, std::vector<int>{0});
  EXPECT_FALSE(std::filesystem::exists(path_));
}

TEST_F(GpuPlans, TheDefaultFileIsInTheUsersCacheFolder) {
  Gpu gpu;
  const std::string path = gpu::default_gemm_cache(gpu.ctx);
  const size_t slash = path.rfind("/anthology/gemm-");
  ASSERT_NE(slash, std::string::npos) << path;
  for (char c : path.substr(slash + 11))
    EXPECT_TRUE(std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '-' || c == '.') << path;
}
}  // namespace
