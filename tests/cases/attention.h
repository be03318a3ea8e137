// Cases: Causal attention.
#pragma once

#include "model/kernels/attention.h"
#include "tests/attention_oracle.h"
#include "tests/cases/op_case.h"

inline std::function<void(Values&)> attention_oracle(int64_t B, int64_t T, int64_t NH, int64_t HS) {
  return [=](Values& v) {
    const attention::Case c{.B = B, .T = T, .NH = NH, .HS = HS};
    const attention::Doubles nothing(v["out"].size());
    const attention::Oracle o = attention::oracle(c, v["qkv"], nothing);
    v["out"] = o.out;
    v["lse"] = o.lse;
    v["row_max"] = o.row_max;
  };
}

inline OpCase attention_forward_case(int64_t B, int64_t T, int64_t NH, int64_t HS,
                                     Op<AttentionForward> op = attention_forward, bool row_max = false) {
  const int64_t C = NH * HS;
  OpCase made{.name = case_name("attention_forward", {{"B", B}, {"T", T}, {"NH", NH}, {"HS", HS}}),
              .operands = {{.name = "out", .shape = {B, T, C}, .output = true, .half = true},
                           {.name = "lse", .shape = {B, NH, T}, .output = true},
                           {.name = "qkv", .shape = {B, T, 3 * C}, .half = true}},
              .run =
                  [=](Context& ctx, const Tensors& t) {
                    op(ctx, {.out = t.at("out"),
                             .lse = t.at("lse"),
                             .qkv = t.at("qkv"),
                             .NH = NH,
                             .row_max = row_max ? t.at("row_max") : Tensor{}});
                  },
              .oracle = attention_oracle(B, T, NH, HS),
              .tolerance = 5e-6,
              .flops = 2.0 * B * T * (T + 1) * C,  // two products of the pairs that exist
              .bytes = 4.0 * (4 * B * T * C + (row_max ? 2 : 1) * B * NH * T),
              .scratch_bytes = [=](const Context& ctx) { return attention_scratch_bytes(ctx, B, T, NH, HS); },
              .half_tolerance = 1.0 / 16};  // probabilities are bf16 too: sums that cancel lose digits
  if (!row_max) return made;
  made.name += ",row_max";
  made.operands.push_back({.name = "row_max", .shape = {B, NH, T}, .output = true});
  return made;
}

inline OpCase attention_backward_case(int64_t B, int64_t T, int64_t NH, int64_t HS,
                                      Op<AttentionBackward> op = attention_backward) {
  const int64_t C = NH * HS;
  return {.name = case_name("attention_backward", {{"B", B}, {"T", T}, {"NH", NH}, {"HS", HS}}),
          .operands = {{.name = "dqkv", .shape = {B, T, 3 * C}, .output = true, .half = true},
                       {.name = "dout", .shape = {B, T, C}, .half = true},
                       {.name = "out", .shape = {B, T, C}, .half = true},
                       {.name = "lse", .shape = {B, NH, T}},
                       {.name = "qkv", .shape = {B, T, 3 * C}, .half = true}},
          .run =
              [=](Context& ctx, const Tensors& t) {
                op(ctx, {.dqkv = t.at("dqkv"),
                         .dout = t.at("dout"),
                         .out = t.at("out"),
                         .lse = t.at("lse"),
                         .qkv = t.at("qkv"),
                         .NH = NH});
              },
          .oracle =
              [=](Values& v) {
                const attention::Case c{.B = B, .T = T, .NH = NH, .HS = HS};
                const attention::Stored stored{v["out"], v["lse"]};
                v["dqkv"] = attention::oracle(c, v["qkv"], v["dout"], 0, &stored).dqkv;
              },
          .tolerance = 1e-5,
          .flops = 5.0 * B * T * (T + 1) * C,  // five products, though a GPU computes two of them twice
          .bytes = 4.0 * (8 * B * T * C + B * NH * T),
          .prepare = attention_oracle(B, T, NH, HS),
          .scratch_bytes = [=](const Context& ctx) { return attention_scratch_bytes(ctx, B, T, NH, HS); },
          .half_tolerance = 1.0 / 16,  // as above
          .loss =
              [=](const Values& v) {
                const attention::Case c{.B = B, .T = T, .NH = NH, .HS = HS};
                return sum_of_products(v.at("dout"), attention::oracle(c, v.at("qkv"), v.at("dout")).out);
              },
          .gradients = {{"dqkv", "qkv"}}};
}
