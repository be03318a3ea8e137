// Cases: Token and position embedding.
#pragma once

#include "model/kernels/embedding.h"
#include "tests/cases/op_case.h"

inline std::vector<double> embedding_of(const Values& v, int64_t T, int64_t C) {
  const auto &tokens = v.at("tokens"), &wte = v.at("wte"), &wpe = v.at("wpe");
  std::vector<double> y(tokens.size() * C);
  for (size_t i = 0; i < y.size(); ++i) {
    const auto bt = static_cast<int64_t>(i) / C, c = static_cast<int64_t>(i) % C;
    y[i] = wte[static_cast<int64_t>(tokens[bt]) * C + c] + wpe[bt % T * C + c];
  }
  return y;
}

inline OpCase embedding_forward_case(int64_t B, int64_t T, int64_t C, int64_t V,
                                     Op<EmbeddingForward> op = embedding_forward) {
  return {.name = case_name("embedding_forward", {{"B", B}, {"T", T}, {"C", C}, {"V", V}}),
          .operands = {{.name = "y", .shape = {B, T, C}, .output = true, .half = true},
                       {.name = "tokens", .shape = {B, T}, .below = V},
                       {.name = "wte", .shape = {V, C}, .half = true},
                       {.name = "wpe", .shape = {T + 3, C}, .half = true}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                op(ctx, {.y = t.at("y"), .tokens = t.at("tokens"), .wte = t.at("wte"), .wpe = t.at("wpe")});
              },
          .oracle = [=](Values& v) { v["y"] = embedding_of(v, T, C); },
          .tolerance = 1e-6,
          .bytes = 8.0 * B * T * C + 4.0 * T * C};
}

inline OpCase embedding_backward_case(int64_t B, int64_t T, int64_t C, int64_t V, bool accumulate_wte,
                                      bool accumulate_wpe, Op<EmbeddingBackward> op = embedding_backward) {
  OpCase made{
      .name = case_name("embedding_backward", {{"B", B}, {"T", T}, {"C", C}, {"V", V}}),
      .operands = {{.name = "dwte", .shape = {V, C}, .output = true},
                   {.name = "dwpe", .shape = {T + 3, C}, .output = true},
                   {.name = "dy", .shape = {B, T, C}, .half = true},
                   {.name = "tokens", .shape = {B, T}, .below = V},
                   {.name = "order", .shape = {B * T}, .below = B * T},
                   {.name = "wte", .shape = {V, C}},
                   {.name = "wpe", .shape = {T + 3, C}}},
      .run =
          [=](Context& ctx, const Tensors& t) {
            op(ctx, {.dwte = t.at("dwte"),
                     .dwpe = t.at("dwpe"),
                     .dy = t.at("dy"),
                     .tokens = t.at("tokens"),
                     .order = t.at("order"),
                     .accumulate_wte = accumulate_wte,
                     .accumulate_wpe = accumulate_wpe});
          },
      .oracle =
          [=](Values& v) {
            auto &dwte = v["dwte"], &dwpe = v["dwpe"];
            if (!accumulate_wte) dwte.assign(dwte.size(), 0);
            if (!accumulate_wpe) dwpe.assign(dwpe.size(), 0);
            for (int64_t i = 0; i < B * T * C; ++i) {
              dwte[static_cast<int64_t>(v["tokens"][i / C]) * C + i % C] += v["dy"][i];
              dwpe[i / C % T * C + i % C] += v["dy"][i];
            }
          },
      .tolerance = 2e-6,
      .bytes = (12.0 * B + 8.0) * T * C + (accumulate_wte ? 0.0 : 4.0 * V * C),
      .prepare =
          [=](Values& v) {
            const std::vector<int32_t> tokens(v["tokens"].begin(), v["tokens"].end());
            std::vector<int32_t> order(tokens.size());
            sort_tokens(tokens, V, order);
            v["order"].assign(order.begin(), order.end());
          },
      .scratch_bytes = [=](const Context& ctx) { return embedding_backward_scratch_bytes(ctx, B * T, C); }};
  if (accumulate_wte) made.name += ",accumulate_wte";
  if (accumulate_wpe) made.name += ",accumulate_wpe";
  if (accumulate_wte || accumulate_wpe) return made;
  made.loss = [=](const Values& v) { return sum_of_products(v.at("dy"), embedding_of(v, T, C)); };
  made.gradients = {{"dwte", "wte"}, {"dwpe", "wpe"}};
  return made;
}
