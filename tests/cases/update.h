// Cases: The optimizer's elementwise arithmetic.
#pragma once

#include "optim/update.h"
#include "tests/cases/op_case.h"
#include "tests/cases/reduce.h"

/// Which of its tensors smooth() finds in bf16 on a GPU that computes in it.
enum class HalfSmooth { none, u, g };

inline OpCase smooth_case(int64_t count, int64_t n, bool remember, bool nesterov, HalfSmooth half) {
  const TensorPieces pieces{count, n};
  const Shape all{pieces.total()};
  const bool in_place = half == HalfSmooth::none;
  const auto beta = [](int64_t i) { return 0.9f - 0.01f * static_cast<float>(i % 7); };
  OpCase made{.name = case_name("smooth", {{"count", count}, {"n", n}}),
              .operands = {{.name = "g", .shape = all, .half = half == HalfSmooth::g},
                           {.name = "u",
                            .shape = all,
                            .output = true,
                            .same_as = in_place ? "g" : "",
                            .half = half == HalfSmooth::u},
                           {.name = "m", .shape = all, .output = true},
                           {.name = "scale", .shape = {1}}},
              .run =
                  [=](Context& ctx, const Tensors& t) {
                    std::vector<Smooth> list;
                    for (int64_t i = 0; i < count; ++i)
                      list.push_back({.u = pieces.of(t.at("u"), i),
                                      .m = remember ? pieces.of(t.at("m"), i) : Tensor{},
                                      .g = pieces.of(t.at("g"), i),
                                      .beta = beta(i),
                                      .gain = 1 - beta(i),
                                      .scale = i % 2 ? Tensor{} : t.at("scale"),
                                      .nesterov = nesterov});
                    smooth(ctx, list);
                  },
              .oracle =
                  [=](Values& v) {
                    for (int64_t i = 0; i < count; ++i)
                      for (int64_t k = pieces.start(i); k < pieces.start(i + 1); ++k) {
                        const double x = (1 - beta(i)) * v["g"][k] * (i % 2 ? 1 : v["scale"][0]);
                        if (remember) v["m"][k] = beta(i) * v["m"][k] + x;
                        v["u"][k] = !remember ? x : nesterov ? beta(i) * v["m"][k] + x : v["m"][k];
                      }
                  },
              .tolerance = 1e-6,
              .bytes = (remember ? 16.0 : 8.0) * pieces.total()};
  if (remember) made.name += nesterov ? ",nesterov" : ",mean";
  if (!in_place) made.name += half == HalfSmooth::u ? ",half_u" : ",half_g";
  return made;
}

/// What smooth() does to a weight in one pass, as rules use it.
enum class SmoothRule { sgd, nesterov, lion, sign };

/// lion: u = sign(0.9 m + 0.1 x), m <- 0.99 m + 0.01 x, cautious. nesterov keeps u, too.
inline OpCase smooth_into_case(int64_t count, int64_t n, SmoothRule rule) {
  const TensorPieces pieces{count, n};
  const Shape all{pieces.total()};
  const bool lion = rule == SmoothRule::lion, nesterov = rule == SmoothRule::nesterov;
  const bool remembers = lion || nesterov, sign = lion || rule == SmoothRule::sign;
  const double beta = lion ? 0.99f : 0.95f, look = 0.9f;
  const auto step = [](int64_t i) { return 0.1f * static_cast<float>(1 + i % 5); };
  constexpr const char* kNames[] = {"sgd", "nesterov", "lion", "sign"};
  OpCase made{
      .name = case_name("smooth", {{"count", count}, {"n", n}}) + ",into," + kNames[static_cast<int>(rule)],
      .operands = {{.name = "g", .shape = all, .half = nesterov},
                   {.name = "u", .shape = all, .output = true},
                   {.name = "m", .shape = all, .output = true},
                   {.name = "w", .shape = all, .output = true},
                   {.name = "scale", .shape = {1}}},
      .run =
          [=](Context& ctx, const Tensors& t) {
            std::vector<Smooth> list;
            for (int64_t i = 0; i < count; ++i) {
              list.push_back({.u = nesterov ? pieces.of(t.at("u"), i) : Tensor{},
                              .m = remembers ? pieces.of(t.at("m"), i) : Tensor{},
                              .g = pieces.of(t.at("g"), i),
                              .beta = remembers ? beta : 0,
                              .gain = remembers ? 1 - beta : 1,
                              .scale = i % 2 ? Tensor{} : t.at("scale"),
                              .nesterov = nesterov,
                              .sign = sign,
                              .into = {.w = pieces.of(t.at("w"), i),
                                       .step = step(i),
                                       .decay = i % 3 == 0 ? 0 : 0.25,
                                       .cautious = lion}});
              if (lion) list.back().look = Look{.m = look, .g = 1 - look};
            }
            smooth(ctx, list);
          },
      .oracle =
          [=](Values& v) {
            for (int64_t i = 0; i < count; ++i)
              for (int64_t k = pieces.start(i); k < pieces.start(i + 1); ++k) {
                const double x = v["g"][k] * (i % 2 ? 1 : v["scale"][0]), old = v["m"][k];
                const double m = beta * old + (1 - beta) * x;
                double u = lion ? look * old + (1 - look) * x : nesterov ? beta * m + (1 - beta) * x : x;
                if (sign) u = u > 0 ? 1 : u < 0 ? -1 : 0;
                if (remembers) v["m"][k] = m;
                if (nesterov) v["u"][k] = u;
                double& w = v["w"][k];
                const bool decays = i % 3 != 0 && (!lion || u * w > 0);
                w = w - (decays ? 0.25 * w : 0) - step(i) * u;
              }
          },
      .tolerance = 2e-6,
      .bytes = (12.0 + (remembers ? 8 : 0) + (nesterov ? 4 : 0)) * pieces.total()};
  return made;
}

/// `into`: moves a weight in the same pass, and keeps no u.
inline OpCase adam_case(int64_t count, int64_t n, bool first, bool second, bool into = false) {
  const TensorPieces pieces{count, n};
  const Shape all{pieces.total()};
  const float beta1 = first ? 0.9f : 0, beta2 = second ? 0.95f : 0;
  OpCase made{
      .name = case_name("adam_direction", {{"count", count}, {"n", n}}),
      .operands = {{.name = "g", .shape = all},
                   {.name = "u", .shape = all, .output = true, .same_as = "g"},
                   {.name = "m", .shape = all, .output = true},
                   {.name = "v", .shape = all, .output = true},
                   {.name = "w", .shape = all, .output = true},
                   {.name = "scale", .shape = {1}}},
      .run =
          [=](Context& ctx, const Tensors& t) {
            std::vector<AdamDirection> list;
            for (int64_t i = 0; i < count; ++i)
              list.push_back(
                  {.u = into ? Tensor{} : pieces.of(t.at("u"), i),
                   .m = first ? pieces.of(t.at("m"), i) : Tensor{},
                   .v = second ? pieces.of(t.at("v"), i) : Tensor{},
                   .g = pieces.of(t.at("g"), i),
                   .beta1 = beta1,
                   .beta2 = beta2,
                   .eps = 0.01f,
                   .correction1 = 0.25f,
                   .correction2 = 0.125f * static_cast<float>(1 + i % 3),
                   .gain = i % 3 ? 1 : 1.5,
                   .scale = i % 2 ? t.at("scale") : Tensor{},
                   .into = {.w = into ? pieces.of(t.at("w"), i) : Tensor{}, .step = 0.5, .decay = 0.25}});
            adam_direction(ctx, list);
          },
      .oracle =
          [=](Values& v) {
            for (int64_t i = 0; i < count; ++i)
              for (int64_t k = pieces.start(i); k < pieces.start(i + 1); ++k) {
                const double x = v["g"][k] * (i % 3 ? 1 : 1.5) * (i % 2 ? v["scale"][0] : 1);
                if (first) v["m"][k] = beta1 * v["m"][k] + (1 - beta1) * x;
                if (second) v["v"][k] = beta2 * v["v"][k] + (1 - beta2) * x * x;
                const double root =
                    second ? std::sqrt(v["v"][k] / (0.125 * static_cast<double>(1 + i % 3))) : std::abs(x);
                const double u = (first ? v["m"][k] : x) / 0.25 / (root + 0.01f);
                if (into)
                  v["w"][k] = v["w"][k] - 0.25 * v["w"][k] - 0.5 * u;
                else
                  v["u"][k] = u;
              }
          },
      .tolerance = 2e-6,
      .bytes = (8.0 + (into ? 4 : 0) + (first ? 8 : 0) + (second ? 8 : 0)) * pieces.total(),
      .prepare =
          [](Values& v) {
            for (double& value : v["v"]) value = std::abs(value);
          }};
  if (first) made.name += ",m";
  if (second) made.name += ",v";
  if (into) made.name += ",into";
  return made;
}

inline OpCase sign_case(int64_t count, int64_t n) {
  const TensorPieces pieces{count, n};
  return {.name = case_name("sign", {{"count", count}, {"n", n}}),
          .operands = {{.name = "x", .shape = {pieces.total()}},
                       {.name = "u", .shape = {pieces.total()}, .output = true}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                std::vector<Sign> list;
                for (int64_t i = 0; i < count; ++i)
                  list.push_back({.u = pieces.of(t.at("u"), i), .x = pieces.of(t.at("x"), i)});
                sign(ctx, list);
              },
          .oracle =
              [](Values& v) {
                for (size_t k = 0; k < v["x"].size(); ++k)
                  v["u"][k] = v["x"][k] == 0 ? 0 : v["x"][k] > 0 ? 1 : -1;
              },
          .tolerance = 0,
          .bytes = 8.0 * pieces.total(),
          .prepare = [](Values& v) { v["x"].back() = 0; }};
}

inline OpCase apply_update_case(int64_t count, int64_t n, bool cautious) {
  const TensorPieces pieces{count, n};
  const auto step = [](int64_t i) { return 0.1f * static_cast<float>(1 + i % 5); };
  return {.name = case_name("apply_update", {{"count", count}, {"n", n}}) + (cautious ? ",cautious" : ""),
          .operands = {{.name = "w", .shape = {pieces.total()}, .output = true},
                       {.name = "u", .shape = {pieces.total()}},
                       {.name = "guard", .shape = {1}}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                std::vector<ApplyUpdate> list;
                for (int64_t i = 0; i < count; ++i)
                  list.push_back({.w = pieces.of(t.at("w"), i),
                                  .u = pieces.of(t.at("u"), i),
                                  .step = step(i),
                                  .decay = i % 3 == 0 ? 0 : 0.25f,
                                  .cautious = cautious,
                                  .guard = i % 2 ? t.at("guard") : Tensor{}});
                apply_update(ctx, list);
              },
          .oracle =
              [=](Values& v) {
                for (int64_t i = 0; i < count; ++i)
                  for (int64_t k = pieces.start(i); k < pieces.start(i + 1); ++k) {
                    double& w = v["w"][k];
                    const double u = v["u"][k];
                    const bool decays = i % 3 != 0 && (!cautious || u * w > 0);
                    w = w - (decays ? 0.25 * w : 0) - step(i) * u;
                  }
              },
          .tolerance = 1e-6,
          .bytes = 12.0 * pieces.total()};
}

inline OpCase clip_factor_case(int64_t n, double limit) {
  return {.name = case_name("clip_factor", {{"n", n}, {"limit", static_cast<int64_t>(limit)}}),
          .operands = {{.name = "squares", .shape = {n}},
                       {.name = "norm", .shape = {1}, .output = true},
                       {.name = "scale", .shape = {1}, .output = true}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                Arena arena("sums");
                Tensor sums, norm;
                arena.add(&sums, DType::f64, {n});
                arena.add(&norm, DType::f64, {1});
                arena.allocate(ctx);
                const OnHost from(ctx, t.at("squares"));
                OnHost to(ctx, sums, /*load=*/false);
                for (int64_t i = 0; i < n; ++i) to->f64()[i] = from->f32()[i];
                to.store();
                clip_factor(ctx, {.sums = sums, .limit = limit, .norm = norm, .scale = t.at("scale")});
                put_number(ctx, t.at("norm"), *OnHost(ctx, norm)->f64());
              },
          .oracle =
              [=](Values& v) {
                double sum = 0;
                for (double square : v["squares"]) sum += square;
                v["norm"][0] = std::sqrt(sum);
                v["scale"][0] = limit > 0 ? std::min(1.0, limit / std::sqrt(sum)) : 1;
              },
          .tolerance = 1e-6,
          .bytes = 8.0 * n,
          .prepare =
              [](Values& v) {
                for (double& square : v["squares"]) square = std::abs(square);
              }};
}

inline OpCase add_diagonal_case(int64_t batch, int64_t n) {
  return {.name = case_name("add_diagonal", {{"batch", batch}, {"n", n}}),
          .operands = {{.name = "x", .shape = {batch, n, n}, .output = true}},
          .run = [](Context& ctx, const Tensors& t) { add_diagonal(ctx, {.x = t.at("x"), .value = 3}); },
          .oracle =
              [=](Values& v) {
                for (int64_t i = 0; i < batch; ++i)
                  for (int64_t j = 0; j < n; ++j) v["x"][(i * n + j) * n + j] += 3;
              },
          .tolerance = 1e-6,
          .bytes = 8.0 * batch * n};
}
