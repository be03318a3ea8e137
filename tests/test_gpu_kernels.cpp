// What the case table cannot express about the CUDA halves of the operations that memory limits: special
// values, pointers that are not aligned, mixed dtypes, and what they do where the CPU half raises an error.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "tests/cases/all.h"
#include "tests/thread_orders.h"

namespace {
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct GpuKernels : testing::Test {
  Context ctx;
  GpuKernels() { use_gpu(ctx, 0, DType::bf16); }

  /// A tensor on the GPU with these values, `offset` elements past an aligned address.
  Tensor put(const std::vector<float>& values, DType dtype, Shape shape, int64_t offset = 0) {
    Tensor block;
    arenas_.push_back(std::make_unique<Arena>("test"));
    arenas_.back()->add(&block, dtype, {offset + shape.size()});
    arenas_.back()->allocate(ctx);
    const Tensor tensor = block.slice(offset, shape.size()).view(shape);
    OnHost host(ctx, tensor, /*load=*/false);
    for (int64_t i = 0; i < tensor.size(); ++i) {
      const float value = values[static_cast<size_t>(i)];
      if (dtype == DType::bf16) host->bf16()[i] = to_bf16(value);
      if (dtype == DType::f32) host->f32()[i] = value;
      if (dtype == DType::i32) host->i32()[i] = static_cast<int32_t>(value);
    }
    host.store();
    return tensor;
  }
  Tensor full(float value, DType dtype, Shape shape) {
    return put(std::vector<float>(static_cast<size_t>(shape.size()), value), dtype, shape);
  }
  Tensor normal(DType dtype, Shape shape, int64_t offset = 0) {
    std::vector<float> values(static_cast<size_t>(shape.size()));
    for (float& value : values) value = std::normal_distribution<float>()(random_);
    return put(values, dtype, shape, offset);
  }
  std::vector<float> get(const Tensor& tensor) {
    const OnHost host(ctx, tensor);
    std::vector<float> values;
    for (int64_t i = 0; i < tensor.size(); ++i)
      values.push_back(tensor.dtype == DType::bf16 ? to_float(host->bf16()[i]) : host->f32()[i]);
    return values;
  }

 private:
  std::vector<std::unique_ptr<Arena>> arenas_;
  std::mt19937 random_{1};
};

constexpr DType kBoth[] = {DType::f32, DType::bf16};

// ------------------------------------------------------------------------------------------- cross-entropy

/// Widths of the four ways through the kernel: by packs or one by one, in shared memory or read twice.
struct Width {
  int64_t V, Vp;
};
constexpr Width kWidths[] = {{65, 128}, {65, 67}, {5001, 5120}, {120001, 120064}, {120001, 120003}};

TEST_F(GpuKernels, CrossEntropyNeverReadsThePaddingAndGivesItZeroGradient) {
  for (DType dtype : kBoth)
    for (const auto& [V, Vp] : kWidths) {
      std::vector<float> values(static_cast<size_t>(2 * Vp), 0.5f);
      for (int64_t i = 0; i < 2 * Vp; ++i)
        if (i % Vp >= V) values[static_cast<size_t>(i)] = kNaN;
      const Tensor logits = put(values, dtype, {2, Vp}), losses = full(9, DType::f32, {2});
      cross_entropy(ctx, {.losses = losses,
                          .logits = logits,
                          .targets = put({0, static_cast<float>(V - 1)}, DType::i32, {2}),
                          .V = V,
                          .grad_scale = 1,
                          .with_gradient = true});
      const std::vector<float> got = get(logits);
      const float p = 1.0f / static_cast<float>(V);
      for (int64_t n = 0; n < 2; ++n) {
        EXPECT_NEAR(get(losses)[static_cast<size_t>(n)], std::log(V), 2e-5);
        for (int64_t v = 0; v < Vp; ++v) {
          const float want = v >= V ? 0 : v == n * (V - 1) ? p - 1 : p;
          ASSERT_NEAR(got[static_cast<size_t>(n * Vp + v)], want, std::abs(want) / 200) << V << " " << v;
        }
      }
    }
}

TEST_F(GpuKernels, CrossEntropyShowsNonFiniteLogits) {
  for (DType dtype : kBoth)
    for (const auto& [V, Vp] : kWidths)
      for (bool with_gradient : {false, true})
        for (float bad : {kNaN, kInf})
          for (int64_t where : {int64_t{0}, V / 2, V - 1}) {
            std::vector<float> values(static_cast<size_t>(Vp), 1.0f);
            values[static_cast<size_t>(where)] = bad;
            const Tensor losses = full(9, DType::f32, {1});
            cross_entropy(ctx, {.losses = losses,
                                .logits = put(values, dtype, {1, Vp}),
                                .targets = full(7, DType::i32, {1}),
                                .V = V,
                                .with_gradient = with_gradient});
            EXPECT_FALSE(std::isfinite(get(losses)[0])) << bad << " at " << where << " of " << V;
          }
}

TEST_F(GpuKernels, CrossEntropyTakesMinusInfinityAsProbabilityZero) {
  for (DType dtype : kBoth)
    for (const auto& [V, Vp] : kWidths)
      for (bool with_gradient : {false, true}) {
        std::vector<float> values(static_cast<size_t>(Vp), -kInf);  // many threads see nothing else
        values[static_cast<size_t>(V - 1)] = values[static_cast<size_t>(V - 2)] = 3.0f;
        const Tensor logits = put(values, dtype, {1, Vp}), losses = full(9, DType::f32, {1});
        cross_entropy(ctx, {.losses = losses,
                            .logits = logits,
                            .targets = full(static_cast<float>(V - 2), DType::i32, {1}),
                            .V = V,
                            .grad_scale = 1,
                            .with_gradient = with_gradient});
        EXPECT_NEAR(get(losses)[0], std::log(2.0), 1e-6);
        const std::vector<float> got = get(logits);
        EXPECT_EQ(got[0], with_gradient ? 0.0f : -kInf);
        EXPECT_EQ(got[static_cast<size_t>(V - 1)], with_gradient ? 0.5f : 3.0f);
        cross_entropy(ctx, {.losses = losses,
                            .logits = put(values, dtype, {1, Vp}),
                            .targets = full(0, DType::i32, {1}),  // impossible
                            .V = V,
                            .with_gradient = with_gradient});
        EXPECT_EQ(get(losses)[0], kInf);
      }
}

TEST_F(GpuKernels, CrossEntropySurvivesLargeLogits) {
  for (DType dtype : kBoth) {
    const Tensor losses = full(9, DType::f32, {1});
    cross_entropy(ctx, {.losses = losses,
                        .logits = put({-32768, -32768, 32768, -32768, -32768}, dtype, {1, 5}),
                        .targets = full(1, DType::i32, {1}),
                        .V = 5});
    EXPECT_EQ(get(losses)[0], 65536.0f);
  }
}

TEST_F(GpuKernels, CrossEntropyMarksBadTargetsAndLeavesOtherRowsAlone) {
  for (DType dtype : kBoth)
    for (float bad : {-1.0f, 40.0f, 2e9f}) {
      const Tensor logits = full(1, dtype, {2, 64}), losses = full(9, DType::f32, {2});
      cross_entropy(ctx, {.losses = losses,
                          .logits = logits,
                          .targets = put({bad, 3}, DType::i32, {2}),
                          .V = 40,
                          .grad_scale = 1,
                          .with_gradient = true});
      EXPECT_TRUE(std::isnan(get(losses)[0]));
      EXPECT_NEAR(get(losses)[1], std::log(40.0), 1e-6);
      const std::vector<float> got = get(logits);
      for (size_t v = 0; v < 64; ++v) EXPECT_EQ(got[v], 0.0f);
      EXPECT_NEAR(got[64 + 3], 1 / 40.0f - 1, 4e-3);
    }
}

// ----------------------------------------------------------------------------------------------- embedding

TEST_F(GpuKernels, TokensAreSortedByIdAndThenByPosition) {
  std::vector<int32_t> order(8, -9);
  const std::vector<int32_t> tokens{3, 0, 5, 3, -1, 0, 4, 3};
  sort_tokens(tokens, 5, order);
  EXPECT_EQ(order, (std::vector<int32_t>{1, 5, 0, 3, 7, 6, 2, 4}));
  EXPECT_THROW(sort_tokens(tokens, 5, std::span(order).first(7)), ShapeError);
}

TEST_F(GpuKernels, EmbeddingReadsWeightsOfAnyDtype) {
  for (DType y_type : kBoth)
    for (DType wte_type : kBoth)
      for (DType wpe_type : kBoth)
        for (int64_t C : {24, 27}) {
          const Tensor wte = normal(wte_type, {5, C}), wpe = normal(wpe_type, {3, C});
          const Tensor y = full(9, y_type, {2, 3, C});
          const std::vector<float> tokens{4, 0, 2, 2, 1, 0};
          embedding_forward(ctx, {.y = y, .tokens = put(tokens, DType::i32, {2, 3}), .wte = wte, .wpe = wpe});
          const std::vector<float> got = get(y), token = get(wte), position = get(wpe);
          for (int64_t i = 0; i < y.size(); ++i) {
            const float sum = token[static_cast<size_t>(tokens[static_cast<size_t>(i / C)]) * C + i % C] +
                              position[static_cast<size_t>(i / C % 3 * C + i % C)];
            ASSERT_EQ(got[static_cast<size_t>(i)], y_type == DType::bf16 ? to_float(to_bf16(sum)) : sum);
          }
        }
}

TEST_F(GpuKernels, TokensOutsideTheVocabularyShowAndDoNoHarm) {
  const int64_t C = 40;
  const std::vector<float> tokens{2, -1, 5, 1, 2e9f, -2e9f};
  std::vector<int32_t> ids(tokens.begin(), tokens.end()), sorted(6);
  sort_tokens(ids, 5, sorted);
  const Tensor on_gpu = put(tokens, DType::i32, {2, 3});
  const Tensor order = put({sorted.begin(), sorted.end()}, DType::i32, {6});
  for (DType dtype : kBoth) {
    const Tensor y = full(9, dtype, {2, 3, C});
    embedding_forward(
        ctx, {.y = y, .tokens = on_gpu, .wte = full(1, dtype, {5, C}), .wpe = full(2, DType::f32, {3, C})});
    const std::vector<float> got = get(y);
    for (size_t i = 0; i < got.size(); ++i)
      ASSERT_TRUE(i / C == 0 || i / C == 3 ? got[i] == 3 : std::isnan(got[i])) << i;

    const Tensor dwte = full(9, DType::f32, {5, C}), dwpe = full(9, DType::f32, {4, C});
    ctx.scratch.reserve(embedding_backward_scratch_bytes(ctx, 6, C));
    embedding_backward(
        ctx, {.dwte = dwte, .dwpe = dwpe, .dy = full(1, dtype, {2, 3, C}), .tokens = on_gpu, .order = order});
    for (int64_t i = 0; i < 5 * C; ++i)
      ASSERT_EQ(get(dwte)[static_cast<size_t>(i)], i / C == 1 || i / C == 2 ? 1.0f : 0.0f);
    for (int64_t i = 0; i < 4 * C; ++i) ASSERT_EQ(get(dwpe)[static_cast<size_t>(i)], i / C < 3 ? 2.0f : 0.0f);
  }
}

TEST_F(GpuKernels, EmbeddingBackwardNeedsTheOrder) {
  EXPECT_THROW(embedding_backward(ctx, {.dwte = full(0, DType::f32, {5, 8}),
                                        .dwpe = full(0, DType::f32, {3, 8}),
                                        .dy = full(0, DType::bf16, {1, 3, 8}),
                                        .tokens = full(0, DType::i32, {1, 3})}),
               ShapeError);
}

// ----------------------------------------------------------------------------------------------- layernorm

TEST_F(GpuKernels, LayernormTakesStatisticsOfTheSumAsItIsStored) {
  for (int64_t C : {768, 1024, 100}) {
    const Tensor x = full(9, DType::bf16, {3, C}), y = full(9, DType::bf16, {3, C});
    const Tensor residual = normal(DType::bf16, {3, C}), delta = normal(DType::bf16, {3, C});
    const Tensor again = full(9, DType::bf16, {3, C});
    const Tensor gain = normal(DType::f32, {C}), bias = normal(DType::f32, {C});
    const Tensor mean = full(9, DType::f32, {3}), rstd = full(9, DType::f32, {3});
    layernorm_forward(ctx, {.y = y,
                            .mean = mean,
                            .rstd = rstd,
                            .x = x,
                            .gain = gain,
                            .bias = bias,
                            .residual = residual,
                            .delta = delta});
    const std::vector<float> sums = get(x), a = get(residual), b = get(delta);
    for (size_t i = 0; i < sums.size(); ++i) ASSERT_EQ(sums[i], to_float(to_bf16(a[i] + b[i])));
    const std::vector<float> first = get(mean), first_rstd = get(rstd);
    layernorm_forward(ctx, {.y = again, .mean = mean, .rstd = rstd, .x = x, .gain = gain, .bias = bias});
    EXPECT_EQ(first, get(mean));
    EXPECT_EQ(first_rstd, get(rstd));
    EXPECT_EQ(get(y), get(again));
  }
}

// Both ways through the kernels must agree wherever the tensors lie: the second is one element off.
TEST_F(GpuKernels, ResultsDoNotDependOnAlignment) {
  const int64_t rows = 5, C = 64;
  ctx.scratch.reserve(layernorm_backward_scratch_bytes(ctx, C));
  for (DType dtype : kBoth) {
    std::vector<std::vector<float>> results[2];
    for (int64_t offset : {0, 1}) {
      const auto make = [&](const Tensor& like) { return put(get(like), like.dtype, like.shape, offset); };
      const auto keep = [&](const Tensor& tensor) { results[offset].push_back(get(tensor)); };
      std::mt19937 random(3);
      const auto fresh = [&](DType type, Shape shape) {
        std::vector<float> values(static_cast<size_t>(shape.size()));
        for (float& value : values) value = std::normal_distribution<float>()(random);
        return make(put(values, type, shape));
      };
      const Tensor x = fresh(dtype, {rows, C}), y = fresh(dtype, {rows, C}), dy = fresh(dtype, {rows, C});
      const Tensor mean = fresh(DType::f32, {rows}), rstd = fresh(DType::f32, {rows});
      const Tensor gain = fresh(DType::f32, {C}), bias = fresh(DType::f32, {C});
      layernorm_forward(ctx, {.y = y, .mean = mean, .rstd = rstd, .x = x, .gain = gain, .bias = bias});
      keep(y), keep(mean), keep(rstd);
      layernorm_backward(ctx, {.dx = y,
                               .dgain = gain,
                               .dbias = bias,
                               .dy = dy,
                               .x = x,
                               .mean = mean,
                               .rstd = rstd,
                               .gain = fresh(DType::f32, {C})});
      keep(y), keep(gain), keep(bias);
      bias_backward(ctx, {.dbias = bias, .dy = dy});
      keep(bias);
      gelu_forward(ctx, {.y = y, .x = x});
      keep(y);
      gelu_backward(ctx, {.dx = dy, .dy = dy, .x = x});
      keep(dy);
      cast(ctx, {.y = y, .x = x});
      keep(y);
      const Tensor losses = fresh(DType::f32, {rows});
      cross_entropy(ctx, {.losses = losses,
                          .logits = x,
                          .targets = full(3, DType::i32, {rows}),
                          .V = C - 1,
                          .grad_scale = 1,
                          .with_gradient = true});
      keep(losses), keep(x);
    }
    for (size_t i = 0; i < results[0].size(); ++i)
      for (size_t j = 0; j < results[0][i].size(); ++j) {
        const float want = results[0][i][j];
        const float rounding = dtype == DType::bf16 ? 8e-3f : 0;  // sums in another order may round elsewhere
        ASSERT_NEAR(results[1][i][j], want, (2e-6 + rounding) * (1 + std::abs(want))) << i << ", " << j;
      }
  }
}

TEST_F(GpuKernels, NonFiniteInputsReachEveryOutput) {
  for (DType dtype : kBoth)
    for (int64_t C : {40, 37, 1600})
      for (float bad : {kNaN, kInf, -kInf}) {
        ctx.scratch.reserve(layernorm_backward_scratch_bytes(ctx, C));
        std::vector<float> values(static_cast<size_t>(C), 1.0f);
        values[17] = bad;
        const Tensor x = put(values, dtype, {1, C}), y = full(9, dtype, {1, C});
        const Tensor mean = full(9, DType::f32, {1}), rstd = full(9, DType::f32, {1});
        const Tensor gain = full(1, DType::f32, {C}), dgain = full(9, DType::f32, {C});
        const Tensor dbias = full(9, DType::f32, {C});
        layernorm_forward(ctx, {.y = y, .mean = mean, .rstd = rstd, .x = x, .gain = gain, .bias = gain});
        EXPECT_FALSE(std::isfinite(get(y)[0]));
        EXPECT_FALSE(std::isfinite(get(mean)[0]));
        layernorm_backward(ctx, {.dx = y,
                                 .dgain = dgain,
                                 .dbias = dbias,
                                 .dy = x,
                                 .x = full(1, dtype, {1, C}),
                                 .mean = full(0, DType::f32, {1}),
                                 .rstd = full(1, DType::f32, {1}),
                                 .gain = gain});
        EXPECT_FALSE(std::isfinite(get(y)[0]));
        EXPECT_FALSE(std::isfinite(get(dgain)[17]));
        EXPECT_FALSE(std::isfinite(get(dbias)[17]));
        EXPECT_EQ(get(dbias)[16], 1.0f);
        bias_backward(ctx, {.dbias = dbias, .dy = x});
        EXPECT_FALSE(std::isfinite(get(dbias)[17]));
        EXPECT_EQ(get(dbias)[16], 1.0f);
        if (std::isnan(bad)) {
          gelu_forward(ctx, {.y = y, .x = x});
          EXPECT_TRUE(std::isnan(get(y)[17]));
          EXPECT_NEAR(get(y)[16], gelu_of(1), 4e-3);
        }
      }
}

// -------------------------------------------------------------------------------------------- gelu and cast

TEST_F(GpuKernels, GeluIsAccurateFarFromZero) {
  std::vector<float> x;
  for (float value = -30; value <= 30; value += 0.0173f) x.push_back(value);
  for (const float value : {1e3f, 1e8f, 1e12f, 1e18f}) x.push_back(value), x.push_back(-value);
  const Shape shape{static_cast<int64_t>(x.size())};
  const Tensor y = full(9, DType::f32, shape), dx = full(9, DType::f32, shape);
  gelu_forward(ctx, {.y = y, .x = put(x, DType::f32, shape)});
  gelu_backward(ctx, {.dx = dx, .dy = full(1, DType::f32, shape), .x = put(x, DType::f32, shape)});
  const std::vector<float> values = get(y), slopes = get(dx);
  for (size_t i = 0; i < x.size(); ++i) {
    ASSERT_NEAR(values[i], gelu_of(x[i]), 1e-6 * std::abs(gelu_of(x[i])) + 3e-7) << x[i];
    ASSERT_NEAR(slopes[i], gelu_slope_of(x[i]), 1e-6) << x[i];
  }
}

TEST_F(GpuKernels, CastRoundsLikeTheHostAndKeepsSpecialValues) {
  std::vector<float> values{kNaN, kInf, -kInf, 0.0f, -0.0f, 1e-45f, -1e-39f, 3.4e38f, 3.39e38f};
  for (uint32_t bits = 0x3f800000; bits < 0x3f830000; bits += 0x1000)  // ties and their neighbours
    for (uint32_t near : {bits - 1, bits, bits + 1}) values.push_back(std::bit_cast<float>(near));
  Context cpu;
  use_cpu(cpu, 2);
  for (size_t n : {values.size(), values.size() / 8 * 8}) {
    const Shape shape{static_cast<int64_t>(n)};
    const Tensor half = full(9, DType::bf16, shape), back = full(9, DType::f32, shape);
    cast(ctx, {.y = half, .x = put(values, DType::f32, shape)});
    cast(ctx, {.y = back, .x = half});
    std::vector<Bf16> of_cpu(n);
    cast(cpu, {.y = {of_cpu.data(), shape}, .x = {values.data(), shape}});
    std::vector<float> back_on_cpu(n);
    cast(cpu, {.y = {back_on_cpu.data(), shape}, .x = {of_cpu.data(), shape}});
    const std::vector<float> got = get(half), got_back = get(back);
    EXPECT_TRUE(std::isnan(got[0]) && std::isnan(got_back[0]) && std::isnan(back_on_cpu[0]));
    for (size_t i = 1; i < n; ++i) {
      const float want = to_float(to_bf16(values[i]));
      for (float value : {got[i], got_back[i], to_float(of_cpu[i]), back_on_cpu[i]})
        ASSERT_EQ(std::bit_cast<uint32_t>(value), std::bit_cast<uint32_t>(want)) << values[i];
    }
  }
}

TEST_F(GpuKernels, WrongDtypesAreErrors) {
  const Tensor half = full(1, DType::bf16, {2, 8}), single = full(1, DType::f32, {2, 8});
  EXPECT_THROW(gelu_forward(ctx, {.y = half, .x = single}), ShapeError);
  EXPECT_THROW(bias_backward(ctx, {.dbias = full(1, DType::bf16, {8}), .dy = half}), ShapeError);
  EXPECT_THROW(transpose(ctx, {.y = full(1, DType::f32, {8, 2}), .x = half}), ShapeError);
  EXPECT_THROW(transpose(ctx, {.y = half, .x = half}), ShapeError);
  EXPECT_THROW(cast(ctx, {.y = full(1, DType::i32, {2, 8}), .x = half}), ShapeError);
}
}  // namespace
