// QK clip: special values, options, and what it does to the logits of a model. On the CPU, and through the
// CUDA halves where the binary has them.
#include "optim/qk_clip.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "error.h"
#include "model/gpt.h"
#include "model/kernels/head_max.h"
#include "tests/op_run.h"
#include "tests/thread_orders.h"

namespace {
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
using Doubles = std::vector<double>;

/// Where, and in which dtype activations are.
struct On {
  Where where;
  DType dtype = DType::f32;
};
std::vector<On> devices() {
  if (kHaveGpu) return {{Where::cpu}, {Where::gpu}, {Where::gpu, DType::bf16}};
  return {{Where::cpu}};
}
void use(Context& ctx, On on) {
  on.where == Where::cpu ? use_cpu(ctx, 2) : use_gpu(ctx, 0, on.dtype);
}

/// A tensor with memory of its own.
struct Own {
  Context& ctx;
  Tensor tensor;
  Arena arena{"test"};
  Own(Context& ctx, DType dtype, Shape shape, const Doubles& values) : ctx(ctx) {
    arena.add(&tensor, dtype, shape);
    arena.allocate(ctx);
    put(ctx, tensor, values);
  }
  Doubles values() const { return get(ctx, tensor); }
};

TEST(HeadMax, NanIsLargerThanAllAndStays) {
  for (const On on : devices())
    for (const int64_t where : {0, 41, 2099})
      for_each_thread_order([&](const std::string& order) {
        SCOPED_TRACE(order);
        Context ctx;
        use(ctx, on);
        Doubles rows(2 * 3 * 1050, -2.0);  // (B, NH, T): more rows of a head than a block has threads
        const int64_t b = where / 1050, t = where % 1050;
        rows[static_cast<size_t>((b * 3 + 1) * 1050 + t)] = kNan;
        rows[static_cast<size_t>((b * 3 + 2) * 1050 + t)] = -1.0;
        const Own row_max(ctx, DType::f32, {2, 3, 1050}, rows), largest(ctx, DType::f64, {3}, {5, 6, 7});
        const Own calm(ctx, DType::f32, {1, 3, 1}, {3, 4, 5});
        head_max(ctx, {.largest = largest.tensor, .row_max = row_max.tensor});
        EXPECT_EQ(largest.values()[0], -2.0);
        EXPECT_TRUE(std::isnan(largest.values()[1]));
        EXPECT_EQ(largest.values()[2], -1.0);
        head_max(ctx, {.largest = largest.tensor, .row_max = calm.tensor, .accumulate = true});
        EXPECT_EQ(largest.values()[0], 3.0);
        EXPECT_TRUE(std::isnan(largest.values()[1]));
        head_max(ctx, {.largest = largest.tensor, .row_max = calm.tensor});
        EXPECT_EQ(largest.values(), (Doubles{3, 4, 5}));
      });
}

/// Weights (3C, C) and biases of heads whose maxima are all of the unusual ones.
TEST(QkClip, OnlyFiniteMaximaBeyondTauClip) {
  const Doubles maxima = {kNan, kInfinity, -kInfinity, -500, 0, 100, 400};
  const int64_t NH = static_cast<int64_t>(maxima.size()), HS = 5, C = NH * HS, n = 3 * C * C;
  Doubles values(static_cast<size_t>(n));
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = static_cast<float>(1 + 0.001 * static_cast<double>(i % 977));
  for (const On on : devices())
    for (const bool copied : {false, true})
      for_each_thread_order([&](const std::string& order) {
        SCOPED_TRACE(order);
        Context ctx;
        use(ctx, on);
        const Own x(ctx, DType::f32, {3 * C, C}, values), copy(ctx, DType::bf16, {3 * C, C}, values),
            largest(ctx, DType::f64, {NH}, maxima), guard(ctx, DType::f32, {1}, {kNan});
        QkClipRows rows{.x = x.tensor,
                        .copy = copied ? copy.tensor : Tensor{},
                        .largest = largest.tensor,
                        .tau = 100,
                        .alpha = 0.25f,
                        .guard = guard.tensor};
        const Doubles copy_before = copy.values();
        qk_clip(ctx, std::span(&rows, 1));
        EXPECT_EQ(x.values(), values) << "the guard is NaN";
        EXPECT_EQ(copy.values(), copy_before);
        put(ctx, guard.tensor, {0.5});
        qk_clip(ctx, std::span(&rows, 1));
        const Doubles got = x.values(), rounded = copy.values();
        for (int64_t i = 0; i < n; ++i) {
          const auto at = static_cast<size_t>(i);
          const int64_t row = i / C, part = row / C, head = row % C / HS;
          if (head != NH - 1 || part == 2) {
            ASSERT_EQ(got[at], values[at]) << "head " << head << ", part " << part;
            ASSERT_EQ(rounded[at], copy_before[at]);
            continue;
          }
          ASSERT_NEAR(got[at], values[at] * std::pow(0.25, part == 0 ? 0.25 : 0.75), 1e-6) << part;
          ASSERT_EQ(rounded[at], copied ? to_float(to_bf16(static_cast<float>(got[at]))) : copy_before[at]);
        }
      });
}

// Ranks that own some of q, k and v clip those alone.
TEST(QkClip, PartsAreClippedAsTheWhole) {
  constexpr int64_t NH = 3, C = 12;
  const Doubles values = [] {
    Doubles all(3 * C * C);
    for (size_t i = 0; i < all.size(); ++i) all[i] = std::cos(static_cast<double>(i));
    return all;
  }();
  for (const On on : devices()) {
    Context ctx;
    use(ctx, on);
    const Own largest(ctx, DType::f64, {NH}, {300, 50, 120}), whole(ctx, DType::f32, {3 * C, C}, values);
    const QkClipRows all{.x = whole.tensor, .largest = largest.tensor, .tau = 100, .alpha = 0.25f};
    qk_clip(ctx, std::span(&all, 1));
    EXPECT_NE(whole.values(), values);
    for (const std::vector<int>& cuts : {std::vector{0, 1, 2, 3}, {0, 2, 3}, {0, 1, 3}}) {
      const Own x(ctx, DType::f32, {3 * C, C}, values), copy(ctx, DType::bf16, {3 * C, C}, values);
      std::vector<QkClipRows> parts;
      for (size_t i = 0; i + 1 < cuts.size(); ++i) {
        const int count = cuts[i + 1] - cuts[i];
        parts.push_back({.x = x.tensor.slice(cuts[i] * C, count * C),
                         .first = cuts[i],
                         .count = count,
                         .copy = copy.tensor.slice(cuts[i] * C, count * C),
                         .largest = largest.tensor,
                         .tau = 100,
                         .alpha = 0.25f});
      }
      qk_clip(ctx, parts);
      EXPECT_EQ(x.values(), whole.values());
      const Doubles exact = x.values(), rounded = copy.values();
      for (size_t i = 0; i < 3 * C * C; ++i) EXPECT_NEAR(rounded[i], exact[i], 4e-3);
    }
  }
}

TEST(QkClip, RejectsWhatDoesNotFit) {
  Context ctx;
  use_cpu(ctx, 1);
  const Own x(ctx, DType::f32, {12, 4}, Doubles(48)), largest(ctx, DType::f64, {5}, Doubles(5));
  const auto clip = [&](const QkClipRows& rows) { qk_clip(ctx, std::span(&rows, 1)); };
  EXPECT_THROW(clip({.x = x.tensor, .largest = largest.tensor, .tau = 1, .alpha = 0.5f}), ShapeError);
  const Tensor two = largest.tensor.slice(0, 2);
  EXPECT_NO_THROW(clip({.x = x.tensor, .largest = two, .tau = 1, .alpha = 0.5f}));
  EXPECT_NO_THROW(clip({.x = x.tensor, .first = 1, .count = 2, .largest = two, .tau = 1, .alpha = 0.5f}));
  EXPECT_THROW(clip({.x = x.tensor, .first = 2, .count = 2, .largest = two, .tau = 1, .alpha = 0.5f}),
               ShapeError);
  EXPECT_THROW(clip({.x = x.tensor, .largest = two, .tau = 0, .alpha = 0.5f}), ShapeError);
  EXPECT_THROW(clip({.x = x.tensor, .largest = two, .tau = 1, .alpha = 1.5f}), ShapeError);
  EXPECT_THROW(head_max(ctx, {.largest = two, .row_max = x.tensor}), ShapeError);
}

TEST(QkClip, OptionReadsAndWritesItself) {
  EXPECT_FALSE(parse_qk_clip("--qk-clip", "").on());
  EXPECT_EQ(QkClipOptions{}.str(), "");
  for (const char* text : {"100:alpha=0.5", "0.25:alpha=0", "50:alpha=1"})
    EXPECT_EQ(parse_qk_clip("--qk-clip", text).str(), text);
  EXPECT_EQ(parse_qk_clip("--qk-clip", "100").alpha, 0.5);
  for (const char* text :
       {"0", "-1", "nan", "inf", "many", "100x", "100:alpha=2", "100:beta=1", ":alpha=0.5"})
    EXPECT_THROW(parse_qk_clip("--qk-clip", text), UsageError) << text;
}

/// A model whose first layers have logits of very different sizes, and two batches for it.
struct Watched {
  static constexpr int64_t B = 2, T = 13;  // odd: nothing is a multiple of a tile
  Context ctx;
  ModelConfig config{.name = "small", .L = 2, .NH = 2, .C = 128, .positions = 16, .V = 37};
  Gpt model;
  std::vector<int32_t> ids;

  explicit Watched(On on, bool watch = true)
      : model((use(ctx, on), ctx), config, B * T, /*training=*/true, /*micro_batches=*/2, watch) {
    model.allocate();
    model.parameters().initialize(7);
    for (int64_t l = 0; l < config.L; ++l)
      for (const char* part : {"weight", "bias"}) {
        Parameter& p = model.parameters().at("h." + std::to_string(l) + ".attn.c_attn." + part);
        Doubles values = get(ctx, p.value);
        // Keys are the queries, four times as large in head 0: the largest logits are squares.
        const size_t row = values.size() / (3 * 128);  // numbers of a row
        for (size_t i = 0; i < values.size() / 3; ++i) {
          if (row == 1) values[i] = 0.3 * std::sin(static_cast<double>(i));  // else they begin as zeros
          values[i] *= i / row < 64 ? 4 : 1;
          values[i + values.size() / 3] = values[i];
        }
        model.parameters().set(p, [&](float* to) { std::ranges::copy(values, to); });
      }
    for (int64_t i = 0; i < 2 * B * T + 1; ++i) ids.push_back(static_cast<int32_t>(i * i * 7 % 37));
  }
  Tensor tokens(int64_t batch) { return {ids.data() + batch * B * T, {B, T}}; }
  Tensor targets(int64_t batch) { return {ids.data() + batch * B * T + 1, {B, T}}; }
  double run(int64_t batch, bool accumulate = false) {
    return model.forward_backward(tokens(batch), targets(batch), 1, accumulate);
  }
  Doubles maxima() { return get(ctx, model.max_logits()); }
  Doubles values(int64_t layer, const char* part, bool compute = false) {
    const Parameter& p = model.parameters().at("h." + std::to_string(layer) + ".attn.c_attn." + part);
    return get(ctx, compute ? p.compute : p.value);
  }
};

TEST(WatchedModel, MaximaAreThoseOfAllMicroBatches) {
  for (const On on : devices()) {
    Watched watched(on), blind(on, /*watch=*/false);
    const double loss = watched.run(0);
    EXPECT_EQ(loss, blind.run(0)) << "watching changes nothing";
    EXPECT_FALSE(blind.model.max_logits());
    const Doubles first = watched.maxima();
    watched.model.forward(watched.tokens(1), watched.targets(1));
    EXPECT_EQ(watched.maxima(), first) << "a validation leaves them alone";
    watched.run(1);
    const Doubles second = watched.maxima();
    EXPECT_NE(first, second);
    watched.run(0, /*accumulate=*/true);
    Doubles both = watched.maxima();
    for (size_t i = 0; i < both.size(); ++i) EXPECT_EQ(both[i], std::max(first[i], second[i])) << i;
    const auto activations = [](const Gpt& model) {
      for (const MemoryLine& line : model.memory_plan())
        if (line.name == "activations") return line.bytes;
      return int64_t{0};
    };
    EXPECT_GE(activations(watched.model) - activations(blind.model), 4 * 2 * Watched::B * Watched::T);
  }
}

/// Layer 0 sees the same x again: logits of clipped heads shrink to tau, all others stay, bit for bit.
TEST(WatchedModel, ClippedLogitsShrinkToTau) {
  for (const On on : devices()) {
    Watched m(on);
    m.run(0);
    m.run(1, /*accumulate=*/true);
    const Doubles before = m.maxima();
    ASSERT_GT(before[0], 1.5 * before[1]);
    const double tau = std::sqrt(before[0] * before[1]);  // between the two heads of layer 0
    Doubles weight[2], bias[2];
    for (int64_t l : {0, 1}) weight[l] = m.values(l, "weight"), bias[l] = m.values(l, "bias");
    QkClip clip(m.ctx, m.model.parameters(), m.model.max_logits(), {.tau = tau, .alpha = 0.5});
    clip.step(Tensor{});
    EXPECT_EQ(clip.max_logit(clip.mark()), *std::max_element(before.begin(), before.end()));
    for (int64_t l : {0, 1}) {
      const Doubles w = m.values(l, "weight"), b = m.values(l, "bias"), compute = m.values(l, "weight", true);
      for (size_t row = 0; row < 3 * 128; ++row) {
        const double S = before[static_cast<size_t>(2 * l) + row % 128 / 64];
        const double factor = row < 256 && S > tau ? std::sqrt(tau / S) : 1;
        ASSERT_NEAR(b[row], factor * bias[l][row], factor == 1 ? 0 : 1e-6);
        for (size_t i = row * 128; i < (row + 1) * 128; ++i) {
          ASSERT_NEAR(w[i], factor * weight[l][i], factor == 1 ? 0 : 1e-6) << row;
          ASSERT_EQ(compute[i], on.dtype == DType::f32 ? w[i] : to_float(to_bf16(static_cast<float>(w[i]))));
        }
      }
    }
    m.run(0);
    m.run(1, /*accumulate=*/true);
    const Doubles after = m.maxima();
    EXPECT_NEAR(after[0] / tau, 1, on.dtype == DType::f32 ? 1e-4 : 2e-2);  // bf16: of weights, q and k
    EXPECT_EQ(after[1], before[1]);
  }
}

TEST(WatchedModel, ANanShowsAndClipsNothing) {
  for (const On on : devices()) {
    Watched m(on);
    const Tensor gain = m.model.parameters().at("h.1.ln_1.weight").value;
    Doubles values = get(m.ctx, gain);
    values[3] = kNan;
    put(m.ctx, gain, values);
    m.run(0);
    EXPECT_FALSE(std::isnan(m.maxima()[0]));
    EXPECT_TRUE(std::isnan(m.maxima()[2]) && std::isnan(m.maxima()[3]));
    const Doubles weight = m.values(1, "weight");
    QkClip clip(m.ctx, m.model.parameters(), m.model.max_logits(), {.tau = 1e-3, .alpha = 0.5});
    clip.step(Tensor{});
    EXPECT_TRUE(std::isnan(clip.max_logit(clip.mark())));
    EXPECT_EQ(m.values(1, "weight"), weight);
  }
}
}  // namespace
