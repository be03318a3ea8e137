// An update in one pass against the direction and apply_update, bit for bit, on both devices.
#include "optim/update.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <random>

#include "tests/op_run.h"

namespace {
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// The tensors of two entries, of different sizes and the second one at any address, where ctx computes.
struct Operands {
  static constexpr int64_t kFirst = 8200, kSecond = 1031;
  Tensor g, u, m, v, w, copy, scale;

  Operands(Context& ctx, DType dtype, double scale_value) : arena_("test") {
    for (Tensor* tensor : {&g, &u, &m, &v, &w}) arena_.add(tensor, dtype, {kFirst + kSecond});
    arena_.add(&copy, DType::bf16, {kFirst + kSecond});
    arena_.add(&scale, {1});
    arena_.allocate(ctx);
    std::mt19937_64 random(7);
    for (const Tensor& tensor : {g, u, m, v, w, copy}) {
      std::vector<double> values(static_cast<size_t>(tensor.size()));
      for (double& value : values) value = std::normal_distribution<double>()(random);
      if (tensor.data == v.data)
        for (double& value : values) value = std::abs(value);
      if (tensor.data == g.data) values[5] = 0, values[6] = kNaN, values[7] = -0.0;
      put(ctx, tensor, values);
    }
    put(ctx, scale, {scale_value});
  }
  Tensor part(const Tensor& all, int64_t i) const {
    return i == 0 ? all.slice(1, kFirst - 1) : all.slice(kFirst, kSecond);
  }

 private:
  Arena arena_;
};

/// The bytes of every tensor that an update may write; of u only where it is kept.
std::map<std::string, std::vector<std::byte>> bytes_of(Context& ctx, const Operands& o, bool with_u) {
  std::map<std::string, std::vector<std::byte>> all;
  for (const auto& [name, tensor] :
       {std::pair<const char*, Tensor>{"m", o.m}, {"v", o.v}, {"w", o.w}, {"copy", o.copy}, {"u", o.u}}) {
    if (tensor.data == o.u.data && !with_u) continue;
    const OnHost here(ctx, tensor);
    const auto* begin = static_cast<const std::byte*>(here->data);
    all[name].assign(begin, begin + tensor.bytes());
  }
  return all;
}

/// How the weight is moved.
struct Move {
  bool cautious, copies, keeps;  // keeps: u, too
  ApplyTo into(const Operands& o, int64_t i, bool guarded) const {
    return {.w = o.part(o.w, i),
            .copy = copies ? o.part(o.copy, i) : Tensor{},
            .step = 0.1,
            .decay = 0.01,
            .cautious = cautious,
            .guard = guarded ? o.scale : Tensor{}};
  }
};

class Update : public testing::TestWithParam<Where> {
 protected:
  Update() { GetParam() == Where::gpu ? use_gpu(ctx, 0, DType::f32) : use_cpu(ctx, 2); }

  /// `direct(operands, i)` is an entry that writes its direction to u; `run` runs a list of them.
  template <typename Entry>
  void expect_same(const std::function<Entry(const Operands&, int64_t)>& direct,
                   void (*run)(Context&, std::span<const Entry>)) {
    for (const DType dtype : {DType::f32, DType::f64})
      for (const double scale : {0.75, kNaN})
        for (const Move& move : {Move{false, false, false}, {true, true, false}, {true, false, true}}) {
          SCOPED_TRACE(std::string(dtype_name(dtype)) + (move.cautious ? " cautious" : "") +
                       (std::isnan(scale) ? " NaN" : ""));
          Operands apart(ctx, dtype, scale), fused(ctx, dtype, scale);
          const auto untouched = bytes_of(ctx, apart, move.keeps);
          std::vector<Entry> directions, both;
          std::vector<ApplyUpdate> updates;
          for (int64_t i = 0; i < 2; ++i) {
            directions.push_back(direct(apart, i));
            const ApplyTo into = move.into(apart, i, true);
            updates.push_back({.w = into.w,
                               .u = apart.part(apart.u, i),
                               .copy = into.copy,
                               .step = into.step,
                               .decay = into.decay,
                               .cautious = into.cautious,
                               .guard = into.guard});
            both.push_back(direct(fused, i));
            both.back().into = move.into(fused, i, i == 1);  // the scale alone guards the weight, too
            if (!move.keeps) both.back().u = Tensor{};
          }
          run(ctx, directions);
          apply_update(ctx, updates);
          run(ctx, both);
          const auto want = bytes_of(ctx, apart, move.keeps), got = bytes_of(ctx, fused, move.keeps);
          for (const auto& [name, bytes] : want) EXPECT_TRUE(bytes == got.at(name)) << name;
          EXPECT_EQ(got == untouched, std::isnan(scale));
        }
  }

  Context ctx;
};

TEST_P(Update, SmoothMovesAWeightAsApplyUpdateDoes) {
  const auto entry = [](const Operands& o, int64_t i, bool remembers) {
    return Smooth{.u = o.part(o.u, i),
                  .m = remembers ? o.part(o.m, i) : Tensor{},
                  .g = o.part(o.g, i),
                  .beta = 0.9,
                  .gain = 0.3,
                  .scale = o.scale};
  };
  for (const char* how : {"copy", "sign", "mean", "nesterov", "look", "lion"}) {
    SCOPED_TRACE(how);
    const std::string name = how;
    expect_same<Smooth>(
        [&](const Operands& o, int64_t i) {
          Smooth made = entry(o, i, name != "copy" && name != "sign");
          made.nesterov = name == "nesterov";
          made.sign = name == "sign" || name == "lion";
          if (name == "look" || name == "lion") made.look = Look{.m = 0.8, .g = 0.15};
          return made;
        },
        smooth);
  }
}

TEST_P(Update, AdamMovesAWeightAsApplyUpdateDoes) {
  for (const bool first : {false, true})
    for (const bool second : {false, true}) {
      SCOPED_TRACE(std::string(first ? "m" : "") + (second ? "v" : ""));
      expect_same<AdamDirection>(
          [&](const Operands& o, int64_t i) {
            return AdamDirection{.u = o.part(o.u, i),
                                 .m = first ? o.part(o.m, i) : Tensor{},
                                 .v = second ? o.part(o.v, i) : Tensor{},
                                 .g = o.part(o.g, i),
                                 .beta1 = first ? 0.9 : 0,
                                 .beta2 = second ? 0.95 : 0,
                                 .eps = 1e-3,
                                 .correction1 = 0.25,
                                 .correction2 = 0.5,
                                 .scale = o.scale};
          },
          adam_direction);
    }
}

TEST_P(Update, WithoutAMemoryASignIsThatOfTheGradient) {
  for (const DType dtype : {DType::f32, DType::f64}) {
    Operands o(ctx, dtype, 0.75);
    sign(ctx, {.u = o.u, .x = o.g});
    const std::vector<double> u = get(ctx, o.u), g = get(ctx, o.g);
    for (size_t i = 0; i < u.size(); ++i)
      ASSERT_TRUE(std::isnan(g[i]) ? std::isnan(u[i]) : u[i] == (g[i] > 0 ? 1 : g[i] < 0 ? -1 : 0)) << g[i];
    EXPECT_TRUE(std::isnan(u[6]));
  }
}

TEST_P(Update, ALookAtTheNewMeanIsTheMean) {  // Lion(b, b) = Signum
  for (const DType dtype : {DType::f32, DType::f64})
    for (const bool sign : {false, true}) {
      Operands mean(ctx, dtype, 0.75), look(ctx, dtype, 0.75);
      Smooth entry{
          .u = mean.u, .m = mean.m, .g = mean.g, .beta = 0.9, .gain = 0.1, .scale = mean.scale, .sign = sign};
      smooth(ctx, entry);
      entry.u = look.u, entry.m = look.m, entry.g = look.g, entry.scale = look.scale;
      entry.look = Look{.m = 0.9, .g = 0.1};
      smooth(ctx, entry);
      // A compiler may fuse other multiplications and additions: to rounding.
      const std::vector<double> want = get(ctx, mean.u), got = get(ctx, look.u);
      const double tolerance = sign ? 0 : dtype == DType::f64 ? 1e-15 : 4e-7;
      for (size_t i = 0; i < want.size(); ++i)
        ASSERT_TRUE(std::abs(got[i] - want[i]) <= tolerance || (std::isnan(got[i]) && std::isnan(want[i])))
            << i;
      EXPECT_TRUE(bytes_of(ctx, mean, false) == bytes_of(ctx, look, false));
    }
}

// Without gradients state decays, and ends: float32 below 1e-38 would stay where 0.9 x rounds to x.
TEST_P(Update, StateThatDecaysEndsAtZero) {
  for (const DType dtype : {DType::f32, DType::f64}) {
    SCOPED_TRACE(dtype_name(dtype));
    const double least =
        dtype == DType::f32 ? std::numeric_limits<float>::min() : std::numeric_limits<double>::min();
    const Operands o(ctx, dtype, 1);
    const size_t size = static_cast<size_t>(o.g.size());
    const std::vector<double> start(size, 3 * least), zero(size, 0.0);
    const auto check = [&](const std::function<void()>& step, const std::vector<Tensor>& states) {
      put(ctx, o.g, zero);
      for (const Tensor& x : states) put(ctx, x, start);
      for (int t = 0; t < 40; ++t) {
        step();
        for (const Tensor& x : states)
          for (const double value : get(ctx, x)) ASSERT_TRUE(value == 0 || value >= least) << value;
      }
      for (const Tensor& x : states) EXPECT_EQ(get(ctx, x), zero);
    };
    check(
        [&] {
          adam_direction(ctx,
                         {.u = o.u, .m = o.m, .v = o.v, .g = o.g, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8});
        },
        {o.m, o.v});
    check(
        [&] {
          smooth(ctx, {.u = o.u, .m = o.m, .g = o.g, .beta = 0.9, .gain = 0.1, .drop_denormals = true});
        },
        {o.m});
  }
}

// Gradients as small as that still have a direction.
TEST_P(Update, DirectionsOfDenormalGradients) {
  const Operands o(ctx, DType::f32, 1);
  const std::vector<double> tiny(static_cast<size_t>(o.g.size()), -1e-40);
  put(ctx, o.g, tiny);
  for (const bool sign : {true, false}) {
    put(ctx, o.m, std::vector<double>(tiny.size(), 0.0));
    smooth(ctx,
           {.u = o.u, .m = o.m, .g = o.g, .beta = 0.5, .gain = 0.5, .sign = sign, .drop_denormals = true});
    for (const double u : get(ctx, o.u)) ASSERT_TRUE(sign ? u == -1 : u < 0 && u > -1e-40) << u;
  }
}

TEST_P(Update, WrongEntriesAreErrors) {
  Operands o(ctx, DType::f32, 1), wide(ctx, DType::f64, 1);
  EXPECT_THROW(smooth(ctx, {.u = o.u, .g = o.g, .look = Look{.m = 1, .g = 1}}), ShapeError);  // no m
  EXPECT_THROW(smooth(ctx, {.u = o.u, .g = wide.g}), ShapeError);
  EXPECT_THROW(smooth(ctx, {.m = wide.m, .g = o.g}), ShapeError);
  EXPECT_THROW(smooth(ctx, {.g = o.g, .into = {.w = wide.w}}), ShapeError);
  EXPECT_THROW(smooth(ctx, {.g = o.g, .into = {.w = o.w.slice(0, 3)}}), ShapeError);
  EXPECT_THROW(smooth(ctx, {.g = o.g, .into = {.copy = o.copy}}), ShapeError);
  EXPECT_THROW(apply_update(ctx, {.w = o.w, .u = wide.u, .step = 1}), ShapeError);
  EXPECT_THROW(adam_direction(ctx, {.u = wide.u, .g = o.g, .beta1 = 0, .beta2 = 0, .eps = 0}), ShapeError);
}

INSTANTIATE_TEST_SUITE_P(Devices, Update,
                         kHaveGpu ? testing::Values(Where::cpu, Where::gpu)
                                  : testing::Values(Where::cpu, Where::cpu),
                         [](const auto& info) { return std::string(info.index == 0 ? "cpu" : "gpu"); });
}  // namespace
