// Causal attention against float64 loops, finite differences, and its promises about bits and memory.
#include "model/kernels/attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "tests/attention_oracle.h"

namespace {
using namespace attention;

struct Result {
  Floats out, lse, dqkv, row_max;
};

/// Forward and backward of the operation, with exactly the scratch that it says it needs. Outputs start as
/// NaN, so that an element that nobody wrote shows.
Result run(const Case& c, Floats qkv, Floats dout) {
  Context ctx;
  ctx.threads = c.threads;
  ctx.scratch.reserve(attention_scratch_bytes(ctx, c.B, c.T, c.NH, c.HS));
  const float nan = std::numeric_limits<float>::quiet_NaN();
  Result r{Floats(dout.size(), nan), Floats(static_cast<size_t>(c.B * c.NH * c.T), nan),
           Floats(qkv.size(), nan), Floats(static_cast<size_t>(c.B * c.NH * c.T), nan)};
  const Tensor x(qkv.data(), {c.B, c.T, 3 * c.C()}), out(r.out.data(), {c.B, c.T, c.C()});
  const Tensor lse(r.lse.data(), {c.B, c.NH, c.T});
  attention_forward(
      ctx, {.out = out, .lse = lse, .qkv = x, .NH = c.NH, .row_max = Tensor(r.row_max.data(), lse.shape)});
  attention_backward(ctx, {.dqkv = Tensor(r.dqkv.data(), x.shape),
                           .dout = Tensor(dout.data(), out.shape),
                           .out = out,
                           .lse = lse,
                           .qkv = x,
                           .NH = c.NH});
  EXPECT_LE(ctx.scratch.high_water(), ctx.scratch.capacity());
  return r;
}

void check(const Case& c, float size = 1.0f, double tolerance = 4e-6) {
  SCOPED_TRACE(c.str());
  const Floats qkv = random_floats(c.B * c.T * 3 * c.C(), 1, size),
               dout = random_floats(c.B * c.T * c.C(), 2);
  const Result got = run(c, qkv, dout);
  const Oracle want = oracle(c, doubles(qkv), doubles(dout));
  EXPECT_LT(worst(got.out, want.out), tolerance);
  EXPECT_LT(worst(got.lse, want.lse), tolerance);
  EXPECT_LT(worst(got.row_max, want.row_max), tolerance);
  EXPECT_LT(worst(got.dqkv, want.dqkv), 4 * tolerance);
}

TEST(Attention, MatchesFloat64) {
  for (const int64_t T : {1, 2, 3, 17, 64, 65, 100, 129, 256})
    for (const int64_t HS : {1, 8, 16, 40, 64, 80}) {
      const int64_t pick = T + HS;  // small shapes get every mix of batch, heads and threads over the table
      check(
          {.B = 1 + pick % 3, .T = T, .NH = 1 + 2 * (pick / 3 % 3), .HS = HS, .threads = 1 + int(pick % 4)});
    }
}
TEST(Attention, MatchesFloat64EveryLength) {
  for (int64_t T = 1; T <= 140; ++T) check({.B = 1, .T = T, .NH = 2, .HS = 5, .threads = 3});
}
/// A text that grows: queries from `first` on equal those of the whole, bit for bit.
TEST(Attention, LaterQueriesAlone) {
  const Case c{.B = 1, .T = 150, .NH = 3, .HS = 20};
  const Floats qkv = random_floats(c.B * c.T * 3 * c.C(), 1, 1.0f),
               dout = random_floats(c.B * c.T * c.C(), 2);
  const Result whole = run(c, qkv, dout);
  for (const int64_t first : {1, 63, 64, 65, 128, 149}) {
    Context ctx;
    use_cpu(ctx, 2);
    ctx.scratch.reserve(attention_scratch_bytes(ctx, c.B, c.T, c.NH, c.HS));
    Floats out(whole.out.size(), -1.0f), lse(whole.lse.size(), -1.0f), row_max(lse);
    attention_forward(ctx, {.out = Tensor(out.data(), {c.B, c.T, c.C()}),
                            .lse = Tensor(lse.data(), {c.B, c.NH, c.T}),
                            .qkv = Tensor(const_cast<float*>(qkv.data()), {c.B, c.T, 3 * c.C()}),
                            .NH = c.NH,
                            .first = first,
                            .row_max = Tensor(row_max.data(), {c.B, c.NH, c.T})});
    const size_t from = c.out(0, first, 0, 0);
    EXPECT_EQ(std::memcmp(out.data() + from, whole.out.data() + from, (out.size() - from) * sizeof(float)), 0)
        << first;
    for (int64_t h = 0; h < c.NH; ++h)
      EXPECT_EQ(std::memcmp(&row_max[c.lse(0, h, first)], &whole.row_max[c.lse(0, h, first)],
                            static_cast<size_t>(c.T - first) * sizeof(float)),
                0)
          << first;
  }
}
TEST(Attention, MatchesFloat64EveryHeadSize) {
  for (int64_t HS = 1; HS <= 130; HS += HS < 40 ? 1 : 15) check({.B = 1, .T = 35, .NH = 3, .HS = HS});
}
TEST(Attention, MatchesFloat64WithManyThreads) {
  for (const int64_t heads : {1, 2, 3, 7})
    for (const int threads : {1, 2, 3, 4, 5, 8, 13})
      check({.B = 1, .T = 300, .NH = heads, .HS = 4, .threads = threads});
}
TEST(Attention, MatchesFloat64WithSharpSoftmax) {
  check({.B = 2, .T = 150, .NH = 2, .HS = 24}, 4.0f, 1e-4);  // scores up to 300, so rounded by up to 1.5e-5
}

/// The backward formulas themselves, against central differences of the float64 forward pass.
TEST(Attention, MatchesFiniteDifferences) {
  for (const Case c : {Case{.B = 1, .T = 1, .NH = 1, .HS = 3}, Case{.B = 2, .T = 5, .NH = 3, .HS = 2},
                       Case{.B = 1, .T = 9, .NH = 1, .HS = 8}, Case{.B = 1, .T = 20, .NH = 2, .HS = 3}}) {
    SCOPED_TRACE(c.str());
    const Floats qkv = random_floats(c.B * c.T * 3 * c.C(), 3), dout = random_floats(c.B * c.T * c.C(), 4);
    const Result got = run(c, qkv, dout);
    const auto loss = [&](const Doubles& x) {
      const Doubles out = oracle(c, x, doubles(dout)).out;
      double sum = 0;
      for (size_t i = 0; i < out.size(); ++i) sum += out[i] * dout[i];
      return sum;
    };
    Doubles x = doubles(qkv), slope(x.size());
    const double h = 1e-5;
    for (size_t i = 0; i < x.size(); ++i) {
      const double at = x[i];
      x[i] = at + h;
      const double above = loss(x);
      x[i] = at - h;
      slope[i] = (above - loss(x)) / (2 * h);
      x[i] = at;
    }
    EXPECT_LT(worst(got.dqkv, slope), 5e-6);
  }
}

TEST(Attention, SameBitsRunToRun) {
  for (const Case c : {Case{.B = 1, .T = 200, .NH = 1, .HS = 40, .threads = 3},
                       Case{.B = 2, .T = 129, .NH = 3, .HS = 16, .threads = 2}}) {
    const Floats qkv = random_floats(c.B * c.T * 3 * c.C(), 5), dout = random_floats(c.B * c.T * c.C(), 6);
    const Result once = run(c, qkv, dout);
    for (int i = 0; i < 5; ++i) {
      const Result again = run(c, qkv, dout);
      EXPECT_TRUE(same_bits(once.out, again.out) && same_bits(once.lse, again.lse) &&
                  same_bits(once.dqkv, again.dqkv))
          << c.str();
    }
  }
}

TEST(Attention, ThreadsAgree) {
  Case c{.B = 1, .T = 321, .NH = 3, .HS = 24, .threads = 1};
  const Floats qkv = random_floats(c.B * c.T * 3 * c.C(), 7), dout = random_floats(c.B * c.T * c.C(), 8);
  const Result one = run(c, qkv, dout);
  for (c.threads = 2; c.threads <= 20; ++c.threads) {
    const Result many = run(c, qkv, dout);
    EXPECT_TRUE(same_bits(one.out, many.out) && same_bits(one.lse, many.lse) &&
                same_bits(one.row_max, many.row_max))
        << c.str();
    EXPECT_LT(worst(many.dqkv, doubles(one.dqkv)), 2e-6) << c.str();
  }
}

TEST(Attention, FutureDoesNotReachThePast) {
  const Case c{.B = 1, .T = 150, .NH = 2, .HS = 20, .threads = 2};
  const Floats qkv = random_floats(c.B * c.T * 3 * c.C(), 9), dout = random_floats(c.B * c.T * c.C(), 10);
  const Result before = run(c, qkv, dout);
  for (const int64_t t : {1, 7, 8, 9, 31, 63, 64, 65, 100, 149}) {
    const auto row = static_cast<size_t>(t);
    Floats changed = qkv;
    for (size_t i = row * static_cast<size_t>(3 * c.C()); i < changed.size(); ++i)
      changed[i] = 3 - 2 * changed[i];
    const Result after = run(c, changed, dout);
    const auto n = row * static_cast<size_t>(c.C());
    EXPECT_EQ(std::memcmp(before.out.data(), after.out.data(), n * sizeof(float)), 0) << t;
    EXPECT_NE(before.out[n], after.out[n]) << t;
    for (int64_t h = 0; h < c.NH; ++h)
      EXPECT_EQ(std::memcmp(&before.lse[c.lse(0, h, 0)], &after.lse[c.lse(0, h, 0)], row * sizeof(float)), 0)
          << t;
  }
}

/// A row's largest logit is asked for or not: the rest has the same bits.
TEST(Attention, RowMaxIsOptional) {
  const Case c{.B = 2, .T = 131, .NH = 2, .HS = 20};
  Floats qkv = random_floats(c.B * c.T * 3 * c.C(), 7);
  const Result with = run(c, qkv, random_floats(c.B * c.T * c.C(), 8));
  Context ctx;
  use_cpu(ctx, 2);
  ctx.scratch.reserve(attention_scratch_bytes(ctx, c.B, c.T, c.NH, c.HS));
  Floats out(with.out.size()), lse(with.lse.size());
  attention_forward(ctx, {.out = Tensor(out.data(), {c.B, c.T, c.C()}),
                          .lse = Tensor(lse.data(), {c.B, c.NH, c.T}),
                          .qkv = Tensor(qkv.data(), {c.B, c.T, 3 * c.C()}),
                          .NH = c.NH});
  EXPECT_TRUE(same_bits(out, with.out) && same_bits(lse, with.lse));
}

TEST(Attention, LargeScoresStayFinite) {
  const Case c{.B = 1, .T = 100, .NH = 2, .HS = 16, .threads = 2};
  Floats qkv = random_floats(c.B * c.T * 3 * c.C(), 11);
  for (float& x : qkv) x = x < 0 ? -100.0f : 100.0f;  // scores are multiples of 5000 up to 40000
  const Floats dout = random_floats(c.B * c.T * c.C(), 12);
  const Result got = run(c, qkv, dout);
  const Oracle want = oracle(c, doubles(qkv), doubles(dout));
  EXPECT_LT(worst(got.out, want.out), 1e-5);
  EXPECT_LT(worst(got.lse, want.lse), 1e-5);
  EXPECT_LT(worst(got.row_max, want.row_max), 1e-6);
  EXPECT_LT(worst(got.dqkv, want.dqkv), 0.1);  // lse near 4e4 is rounded by up to 2e-3, which scales P
  for (float& x : qkv) x *= 100;               // values of +-1e4
  for (const Floats& xs : {run(c, qkv, dout).out, run(c, qkv, dout).lse, run(c, qkv, dout).dqkv})
    for (const float x : xs) ASSERT_TRUE(std::isfinite(x));
}

TEST(Attention, NanStaysVisible) {
  const Case c{.B = 2, .T = 70, .NH = 2, .HS = 8, .threads = 2};
  const Floats clean = random_floats(c.B * c.T * 3 * c.C(), 13), dout = random_floats(c.B * c.T * c.C(), 14);
  for (int64_t part = 0; part < 3; ++part) {
    Floats qkv = clean;
    qkv[c.qkv(1, 40, part, 1, 3)] = std::numeric_limits<float>::quiet_NaN();
    const Result got = run(c, qkv, dout);
    EXPECT_TRUE(std::isnan(got.out[c.out(1, 40, 1, 3)])) << part;
    EXPECT_TRUE(part == 0 || std::isnan(got.out[c.out(1, 69, 1, 3)])) << part;
    EXPECT_FALSE(std::isnan(got.out[c.out(1, 69, 0, 3)])) << part;  // other heads and sequences are clean
    EXPECT_FALSE(std::isnan(got.out[c.out(0, 69, 1, 3)])) << part;
    EXPECT_TRUE(std::isnan(got.dqkv[c.qkv(1, 40, 0, 1, 3)])) << part;
    EXPECT_EQ(std::isnan(got.row_max[c.lse(1, 1, 40)]), part < 2);  // v is no part of a logit
    EXPECT_EQ(std::isnan(got.row_max[c.lse(1, 1, 69)]), part == 1);
    EXPECT_FALSE(std::isnan(got.row_max[c.lse(1, 1, 39)])) << part;
    EXPECT_FALSE(std::isnan(got.row_max[c.lse(1, 0, 69)])) << part;
  }
  Floats bad = dout;
  bad[c.out(0, 30, 0, 0)] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(run(c, clean, bad).dqkv[c.qkv(0, 3, 2, 0, 0)]));
}

TEST(Attention, RejectsShapesThatDoNotFit) {
  Context ctx;
  Floats memory(1000);
  const Tensor qkv(memory.data(), {1, 4, 24}), out(memory.data(), {1, 4, 8}), lse(memory.data(), {1, 2, 4});
  const auto forward = [&](Tensor o, Tensor l, Tensor x, int64_t NH) {
    attention_forward(ctx, {.out = o, .lse = l, .qkv = x, .NH = NH});
  };
  EXPECT_THROW(forward(out, lse, qkv, 3), ShapeError);
  EXPECT_THROW(forward(out, lse, qkv, 0), ShapeError);
  EXPECT_THROW(forward(out, lse, Tensor(memory.data(), {1, 4, 25}), 2), ShapeError);
  EXPECT_THROW(forward(out, lse, Tensor(memory.data(), {4, 24}), 2), ShapeError);
  EXPECT_THROW(forward(Tensor(memory.data(), {1, 4, 24}), lse, qkv, 2), ShapeError);
  EXPECT_THROW(forward(out, Tensor(memory.data(), {1, 4, 2}), qkv, 2), ShapeError);
  EXPECT_THROW(attention_forward(ctx, {.out = out, .lse = lse, .qkv = qkv, .NH = 2, .row_max = out}),
               ShapeError);
  EXPECT_THROW(
      attention_backward(ctx, {.dqkv = qkv, .dout = lse, .out = out, .lse = lse, .qkv = qkv, .NH = 2}),
      ShapeError);
  EXPECT_THROW(
      attention_backward(ctx, {.dqkv = out, .dout = out, .out = out, .lse = lse, .qkv = qkv, .NH = 2}),
      ShapeError);
  EXPECT_THROW(forward(out, lse, qkv, 2),
               std::logic_error);  // no scratch reserved: says so instead of crashing
}
}  // namespace
