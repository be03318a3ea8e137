// The hidden matrices of a model under one rule, for benchmarks of the update alone.
#pragma once

#include <algorithm>
#include <chrono>
#include <string>

#include "optim/optimizer.h"

struct HiddenMatrices {
  Context& ctx;
  ParameterTable table;
  Optimizer optimizer;

  HiddenMatrices(Context& ctx, const std::string& model, const std::string& rule)
      : ctx(ctx),
        table(parse_model(model)),
        optimizer(ctx, only_hidden(table), {.rules = {{Role::hidden, rule}}}) {
    table.allocate(ctx, /*with_gradients=*/true);
    optimizer.allocate();
    table.initialize(1);
    fill_gradients();
  }
  static ParameterTable& only_hidden(ParameterTable& table) {
    std::erase_if(table.rows(), [](const Parameter& p) { return p.role != Role::hidden; });
    return table;
  }
  /// Any numbers of full rank do: the initial weights.
  void fill_gradients() {
    for (const Parameter& p : table) {
      const OnHost from(ctx, p.value);
      OnHost to(ctx, p.grad, /*load=*/false);
      std::copy_n(from->f32(), p.size(), to->f32());
      to.store();
    }
  }
  /// Of a step, the mean of `steps` from step `first` on.
  double seconds(int64_t first, int steps) {
    const auto now = [] {
      return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    };
    ctx.synchronize();
    const double start = now();
    for (int64_t t = 0; t < steps; ++t) {
      optimizer.step(first + t, 0);
      optimizer.report();
    }
    ctx.synchronize();
    return (now() - start) / steps;
  }
};
