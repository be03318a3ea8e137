// Time of every rule's step on the hidden matrices of a model, against what its arithmetic and its memory
// traffic take at this machine's rates:
//
//   floor = products' FLOPs / rate of a large product + bytes / rate of a large copy
//
// FLOPs are 2 M N K of every product that the rule makes, symmetric ones in full (they cost half on the CPU,
// so that a rule can be faster than its floor). Bytes: gradient read twice (once for the global norm), weight
// and every tensor of state read and written once. Rules refresh roots and bases now and then; the mean over
// 10 steps counts.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "dev/hidden_matrices.h"
#include "model/flops.h"
#include "setup.h"

namespace {
constexpr int kSteps = 10;

struct RuleBench : HiddenMatrices {
  using HiddenMatrices::HiddenMatrices;
  int64_t bytes() const {
    int64_t state = 0;
    for (const RowInfo& row : optimizer.describe()) state += row.state_bytes;
    return 16 * table.size() + 2 * state;
  }
  /// FLOPs of the products of a step, in the mean.
  double flops() {
    Profile profile;
    ctx.profile = &profile;
    for (int64_t t = 0; t < kSteps; ++t) optimizer.step(t, 0);
    ctx.profile = nullptr;
    double sum = 0;
    for (const Profile::Row& row : profile.rows())
      if (row.op.find("matmul") != std::string::npos) sum += row.work.flops;
    return sum / kSteps;
  }
};

void bench(Context& ctx, const std::string& model, const std::vector<std::string>& rules) {
  ParameterTable table(parse_model(model));
  HiddenMatrices::only_hidden(table);
  fmt::print("hidden matrices of {}, {:.1f}M parameters, {}; mean of {} steps\n", model,
             static_cast<double>(table.size()) / 1e6, describe_device(ctx), kSteps);
  fmt::print("  {:<34} {:>9} {:>8} {:>8} {:>9} {:>6} {:>9} {:>8}\n", "rule", "ms", "GFLOP", "MB", "floor ms",
             "ratio", "GFLOP/s", "GB/s");
  for (const std::string& rule : rules) {
    RuleBench run(ctx, model, rule);
    const double flops = run.flops();
    const MachineRates rates = measure_rates(ctx);
    const double seconds = run.seconds(kSteps, kSteps), bytes = static_cast<double>(run.bytes());
    const double floor = flops / rates.flops + bytes / rates.bytes;
    fmt::print("  {:<34} {:>9.2f} {:>8.1f} {:>8.1f} {:>9.2f} {:>6.2f} {:>9.0f} {:>8.1f}\n", rule,
               1e3 * seconds, flops / 1e9, bytes / 1e6, 1e3 * floor, seconds / floor, rates.flops / 1e9,
               rates.bytes / 1e9);
    std::fflush(stdout);
  }
}
}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> models = {"gpt2-small", "gpt2"}, rules;
  MachineOptions machine;
  CLI::App app("Time of every rule's step against its floor.", "bench_rules");
  app.add_option("--model", models, "presets");
  app.add_option("--rule", rules, "RULE[:key=value,...]; default: every rule with its default keys");
  app.add_option("--threads", machine.threads);
  app.add_option("--device", machine.device);
  app.add_option("--dtype", machine.dtype);
  CLI11_PARSE(app, argc, argv);
  if (rules.empty())
    for (const RuleEntry& entry : rule_table()) rules.emplace_back(entry.name);
  Context ctx;
  use_device(ctx, machine);
  for (const std::string& model : models) bench(ctx, model, rules);
  return 0;
}
