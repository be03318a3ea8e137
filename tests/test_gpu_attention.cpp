// The CUDA half of attention, all of its kernels: against float64, and its promises about bits and memory. In
// the executor in three orders of threads, or on a GPU.
#include <gtest/gtest.h>

#include "model/kernels/attention.h"
#include "tests/attention_oracle.h"
#include "tests/op_run.h"
#include "tests/thread_orders.h"

namespace {
using namespace attention;

/// Which kernels run: float; bf16 on tensor cores where the head size allows it; bf16 that may not use them,
/// because the tensors begin at odd places.
enum class Family { f32, bf16, bf16_odd };

struct Result {
  Floats out, lse, dqkv, row_max;
};

struct Call {
  Case c;
  Family family = Family::f32;
  Floats qkv = random_floats(c.B * c.T * 3 * c.C(), 1), dout = random_floats(c.B * c.T * c.C(), 2);
  int64_t first = 0;
  bool backward = true, row_max = true;

  DType dtype() const { return family == Family::f32 ? DType::f32 : DType::bf16; }
  /// Makes the inputs what the device stores.
  Call& round() {
    if (dtype() == DType::bf16)
      for (Floats* values : {&qkv, &dout})
        for (float& x : *values) x = to_float(to_bf16(x));
    return *this;
  }
  std::string str() const {
    const char* const names[] = {"f32 ", "bf16 ", "bf16, odd places, "};
    return names[static_cast<int>(family)] + c.str();
  }
};

/// Forward and backward, with exactly the scratch that it says it needs. Outputs start as NaN, so that an
/// element that nobody wrote shows.
Result run(const Call& call) {
  const Case& c = call.c;
  Context ctx;
  use_gpu(ctx, 0, call.dtype());
  ctx.scratch.reserve(attention_scratch_bytes(ctx, c.B, c.T, c.NH, c.HS));
  Arena arena("attention");
  const int64_t odd = call.family == Family::bf16_odd ? 1 : 0;
  const auto add = [&](Tensor& tensor, Shape shape) {
    arena.add(&tensor, call.dtype(), {shape.size() + odd});
  };
  const Shape row{c.B, c.T, c.C()}, rows{c.B, c.T, 3 * c.C()};
  Tensor qkv, dout, out, dqkv, lse, row_max;
  add(qkv, rows), add(dqkv, rows), add(dout, row), add(out, row);
  arena.add(&lse, {c.B, c.NH, c.T});
  arena.add(&row_max, lse.shape);
  arena.allocate(ctx);
  for (Tensor* t : {&qkv, &dqkv}) *t = t->slice(odd, rows.size()).view(rows);
  for (Tensor* t : {&dout, &out}) *t = t->slice(odd, row.size()).view(row);
  put(ctx, qkv, doubles(call.qkv));
  put(ctx, dout, doubles(call.dout));
  for (const Tensor& t : {out, lse, dqkv, row_max})
    put(ctx, t, Doubles(static_cast<size_t>(t.size()), std::numeric_limits<double>::quiet_NaN()));
  attention_forward(ctx, {.out = out,
                          .lse = lse,
                          .qkv = qkv,
                          .NH = c.NH,
                          .first = call.first,
                          .row_max = call.row_max ? row_max : Tensor{}});
  if (call.backward)
    attention_backward(ctx, {.dqkv = dqkv, .dout = dout, .out = out, .lse = lse, .qkv = qkv, .NH = c.NH});
  const auto floats = [&](const Tensor& t) {
    const Doubles x = get(ctx, t);
    return Floats(x.begin(), x.end());
  };
  return {floats(out), floats(lse), floats(dqkv), floats(row_max)};
}

bool same_bits(const Result& a, const Result& b) {
  return attention::same_bits(a.out, b.out) && attention::same_bits(a.lse, b.lse) &&
         attention::same_bits(a.dqkv, b.dqkv) && attention::same_bits(a.row_max, b.row_max);
}

/// The result in every order of threads, after seeing that it is the same in all of them.
Result run_in_all_orders(const Call& call) {
  Result first;
  for_each_thread_order([&](const std::string& order) {
    const Result got = run(call);
    if (first.out.empty()) first = got;
    EXPECT_TRUE(same_bits(got, first)) << "not deterministic: " << order;
  });
  return first;
}

/// bf16: no element beyond its bound, and the whole closer than that: errors of single roundings are random.
void expect_bf16(const char* name, const Floats& got, const Doubles& want, const Doubles& bound) {
  ASSERT_EQ(got.size(), want.size());
  double error = 0, dot = 0, got2 = 0, want2 = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double e = got[i] - want[i];
    ASSERT_TRUE(std::abs(e) <= 1.01 * bound[i] + 1e-30)
        << name << "[" << i << "]: got " << got[i] << ", want " << want[i] << " +- " << bound[i];
    error += e * e, dot += got[i] * want[i], got2 += double{got[i]} * got[i], want2 += want[i] * want[i];
  }
  EXPECT_LE(std::sqrt(error), 0x1p-8 * std::sqrt(want2)) << name;
  EXPECT_GE(dot, 0.99999 * std::sqrt(got2 * want2)) << name;
}

void check(Call call) {
  SCOPED_TRACE(call.round().str());
  const Result got = run_in_all_orders(call);
  const Oracle want = oracle(call.c, doubles(call.qkv), doubles(call.dout));
  EXPECT_LT(worst(got.lse, want.lse), 4e-6);
  EXPECT_LT(worst(got.row_max, want.row_max), 4e-6);
  if (call.family == Family::f32) {
    EXPECT_LT(worst(got.out, want.out), 4e-6);
    EXPECT_LT(worst(got.dqkv, want.dqkv), 1.6e-5);
  } else {
    expect_bf16("out", got.out, want.out, want.out_bound);
    expect_bf16("dqkv", got.dqkv, want.dqkv, want.dqkv_bound);
  }
}

TEST(GpuAttention, MatchesFloat64) {
  for (const int64_t T : {1, 2, 17, 64, 65, 130})
    for (const int64_t HS : {1, 5, 16, 20, 64, 128}) {
      const int64_t pick = T + HS;  // every mix of batch and heads over the table
      check({.c = {.B = 1 + pick % 2, .T = T, .NH = 1 + pick % 3, .HS = HS}});
    }
  check({.c = {.B = 1, .T = 100, .NH = 1, .HS = 256}});
}
TEST(GpuAttention, MatchesFloat64OnTensorCores) {
  for (const int64_t HS : {64, 128})
    for (const int64_t T : {1, 2, 15, 16, 31, 33, 63, 64, 65, 96, 127, 128, 129, 200, 257}) {
      const int64_t pick = T + HS / 64;
      check({.c = {.B = 1 + pick % 2, .T = T, .NH = 1 + pick / 2 % 2, .HS = HS}, .family = Family::bf16});
    }
  check({.c = {.B = 3, .T = 70, .NH = 5, .HS = 64}, .family = Family::bf16});
  check({.c = {.B = 1, .T = 520, .NH = 1, .HS = 64}, .family = Family::bf16});
}
TEST(GpuAttention, MatchesFloat64InBf16OfAnyHeadSize) {
  for (const int64_t HS : {1, 16, 20, 256})
    check({.c = {.B = 2, .T = 77, .NH = 2, .HS = HS}, .family = Family::bf16});
}
/// Where vectors and tensor cores cannot be used.
TEST(GpuAttention, MatchesFloat64AtOddPlaces) {
  for (const int64_t HS : {20, 64, 128})
    check({.c = {.B = 2, .T = 70, .NH = 2, .HS = HS}, .family = Family::bf16_odd});
}

/// One of each family of kernels.
std::vector<Call> families(int64_t T) {
  std::vector<Call> calls{{.c = {.B = 1, .T = T, .NH = 2, .HS = 20}},
                          {.c = {.B = 1, .T = T, .NH = 2, .HS = 80}, .family = Family::bf16},
                          {.c = {.B = 1, .T = T, .NH = 2, .HS = 64}, .family = Family::bf16},
                          {.c = {.B = 1, .T = T, .NH = 1, .HS = 128}, .family = Family::bf16}};
  for (Call& call : calls) call.round();
  return calls;
}

/// A text that grows: queries from `first` on equal those of the whole, bit for bit; whole tiles before it
/// are left alone.
TEST(GpuAttention, LaterQueriesAlone) {
  for (Call call : families(270)) {
    SCOPED_TRACE(call.str());
    const Case& c = call.c;
    call.backward = false;
    const Result whole = run(call);
    for (const int64_t first : {1, 63, 64, 128, 129, 255, 256, 269}) {
      call.first = first;
      const Result some = run(call);
      const size_t from = c.out(0, first, 0, 0), before = c.out(0, first / 128 * 128, 0, 0);
      EXPECT_EQ(std::memcmp(&some.out[from], &whole.out[from], (some.out.size() - from) * sizeof(float)), 0)
          << first;
      for (int64_t h = 0; h < c.NH; ++h)
        for (const auto& [a, b] :
             {std::pair(&some.lse, &whole.lse), std::pair(&some.row_max, &whole.row_max)})
          EXPECT_EQ(std::memcmp(&(*a)[c.lse(0, h, first)], &(*b)[c.lse(0, h, first)],
                                static_cast<size_t>(c.T - first) * sizeof(float)),
                    0)
              << first;
      for (size_t i = 0; i < before; ++i) ASSERT_TRUE(std::isnan(some.out[i])) << first;
    }
  }
}

/// A row's largest logit is asked for or not: the rest has the same bits.
TEST(GpuAttention, RowMaxIsOptional) {
  for (Call call : families(131)) {
    SCOPED_TRACE(call.str());
    const Result with = run(call);
    call.row_max = false;
    const Result without = run(call);
    EXPECT_TRUE(attention::same_bits(with.out, without.out) && attention::same_bits(with.lse, without.lse));
    for (const float x : without.row_max) ASSERT_TRUE(std::isnan(x));  // left alone
  }
}

TEST(GpuAttention, FutureDoesNotReachThePast) {
  for (const Call& call : families(150)) {
    SCOPED_TRACE(call.str());
    const Case& c = call.c;
    const Result before = run(call);
    for (const int64_t t : {1, 7, 31, 32, 63, 64, 65, 100, 127, 128, 149}) {
      const auto row = static_cast<size_t>(t), n = row * static_cast<size_t>(c.C());
      Call changed = call;
      changed.backward = false;
      for (size_t i = 3 * n; i < call.qkv.size(); ++i) changed.qkv[i] = 3 - 2 * changed.qkv[i];
      const Result after = run(changed);
      EXPECT_EQ(std::memcmp(before.out.data(), after.out.data(), n * sizeof(float)), 0) << t;
      EXPECT_NE(before.out[n], after.out[n]) << t;
      for (int64_t h = 0; h < c.NH; ++h)
        EXPECT_EQ(std::memcmp(&before.lse[c.lse(0, h, 0)], &after.lse[c.lse(0, h, 0)], row * sizeof(float)),
                  0)
            << t;
    }
  }
}

TEST(GpuAttention, LargeScoresStayFinite) {
  for (Call call : families(150)) {
    SCOPED_TRACE(call.str());
    const double most = 100 * 100 * std::sqrt(static_cast<double>(call.c.HS));
    for (float& x : call.qkv) x = x < 0 ? -100.0f : 100.0f;  // scores in large steps up to `most`
    const Result got = run_in_all_orders(call);
    // lse is rounded by up to 2^-22 of `most`, and P in the backward pass by that factor.
    const double slack = std::exp(most * 0x1p-22) - 1;
    const Oracle want = oracle(call.c, doubles(call.qkv), doubles(call.dout), slack);
    EXPECT_LT(worst(got.lse, want.lse), 1e-6);
    EXPECT_LT(worst(got.row_max, want.row_max), 1e-6);
    EXPECT_LT(worst(got.out, want.out), call.family == Family::f32 ? 1e-5 : 0x1p-8);
    for (size_t i = 0; i < got.out.size(); ++i)
      ASSERT_NEAR(got.out[i], want.out[i], want.out_bound[i] + 1e-6) << i;
    for (size_t i = 0; i < got.dqkv.size(); ++i)
      ASSERT_NEAR(got.dqkv[i], want.dqkv[i], want.dqkv_bound[i] + 1e-6) << i;
    for (float& x : call.qkv) x *= 100;  // values of +-1e4
    const Result huge = run(call.round());
    for (const Floats& xs : {huge.out, huge.lse, huge.dqkv})
      for (const float x : xs) ASSERT_TRUE(std::isfinite(x));
  }
}

TEST(GpuAttention, NanStaysVisible) {
  for (const Call& clean : families(70)) {
    SCOPED_TRACE(clean.str());
    const Case& c = clean.c;
    const int64_t h = c.NH - 1;
    for (int64_t part = 0; part < 3; ++part) {
      Call call = clean;
      call.qkv[c.qkv(0, 40, part, h, 3)] = std::numeric_limits<float>::quiet_NaN();
      const Result got = run(call);
      EXPECT_TRUE(std::isnan(got.out[c.out(0, 40, h, 3)])) << part;
      EXPECT_TRUE(part == 0 || std::isnan(got.out[c.out(0, 69, h, 3)])) << part;
      EXPECT_TRUE(h == 0 || !std::isnan(got.out[c.out(0, 69, 0, 3)])) << part;  // other heads are clean
      EXPECT_TRUE(std::isnan(got.dqkv[c.qkv(0, 40, 0, h, 3)])) << part;
      EXPECT_EQ(std::isnan(got.row_max[c.lse(0, h, 40)]), part < 2);  // v is no part of a logit
      EXPECT_EQ(std::isnan(got.row_max[c.lse(0, h, 69)]), part == 1);
      EXPECT_FALSE(std::isnan(got.row_max[c.lse(0, h, 39)])) << part;
      EXPECT_TRUE(h == 0 || !std::isnan(got.row_max[c.lse(0, 0, 69)])) << part;
    }
  }
}

// Once through every family, forward and backward: `make check` looks for races with this one.
TEST(GpuAttention, NanInTheGradientStaysVisible) {
  for (const Call& clean : families(70)) {
    SCOPED_TRACE(clean.str());
    const Case& c = clean.c;
    const int64_t h = c.NH - 1;
    Call call = clean;
    call.dout[c.out(0, 30, h, 0)] = std::numeric_limits<float>::quiet_NaN();
    EXPECT_TRUE(std::isnan(run(call).dqkv[c.qkv(0, 3, 2, h, 0)]));
  }
}

TEST(GpuAttention, RejectsMixedTypesAndMissingScratch) {
  Context ctx;
  use_gpu(ctx, 0, DType::bf16);
  Tensor qkv, out, lse, half;
  Arena arena("attention");
  arena.add(&qkv, {1, 4, 192});
  arena.add(&out, {1, 4, 64});
  arena.add(&lse, {1, 1, 4});
  arena.add(&half, DType::bf16, {1, 4, 64});
  arena.allocate(ctx);
  EXPECT_THROW(attention_forward(ctx, {.out = half, .lse = lse, .qkv = qkv, .NH = 1}), ShapeError);
  EXPECT_THROW(
      attention_backward(ctx, {.dqkv = qkv, .dout = out, .out = out, .lse = lse, .qkv = qkv, .NH = 1}),
      std::logic_error);
}
}  // namespace
