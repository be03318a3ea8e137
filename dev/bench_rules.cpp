// Time of every rule's step on the hidden matrices of a model, against what its arithmetic and its memory
// traffic take at this machine's rates:
//
//   floor = products' FLOPs / rate of a large product + LAPACK's FLOPs / half that rate
//         + bytes / rate of a large pass over memory, in place or a copy
//
// LAPACK works in float64. FLOPs are 2 M N K of every product that the rule makes, symmetric
// ones in full (they cost half on the CPU, so that a rule can be faster than its floor). Bytes: gradient read
// twice (once for the global norm), weight and every tensor of state read and written once. Rules refresh
// roots and bases now and then; the mean over 10 steps counts, each of them the best of a few rounds, as the
// rates are: what else the machine does would slow both, but not equally.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <string>
#include <string_view>
#include <vector>

#include "dev/hidden_matrices.h"
#include "model/flops.h"
#include "setup.h"

namespace {
constexpr std::string_view kLapack[] = {"symmetric_eigen", "inverse_root_eigen", "qr"};
constexpr int kSteps = 10;
constexpr int kRounds = 5;      // at most,
constexpr double kEnough = 20;  // and no new one after this many seconds

struct RuleBench : HiddenMatrices {
  using HiddenMatrices::HiddenMatrices;
  int64_t bytes() const {
    int64_t state = 0;
    for (const RowInfo& row : optimizer.describe()) state += row.state_bytes;
    return 16 * table.size() + 2 * state;
  }
  /// The operations of the ten steps after the first ten: a rule may begin with what it never does again
  /// (soap with eigenvectors, dion with a basis), and times are measured later, too.
  Profile profile() {
    for (int64_t t = 0; t < kSteps; ++t) optimizer.step(t, 0);
    Profile profile;
    ctx.profile = &profile;
    for (int64_t t = kSteps; t < 2 * kSteps; ++t) optimizer.step(t, 0);
    ctx.profile = nullptr;
    return profile;
  }
  /// FLOPs of a step, in the mean.
  struct Flops {
    double products = 0, lapack = 0;
  };
  static Flops flops(const Profile& profile) {
    Flops sum;
    for (const Profile::Row& row : profile.rows()) {
      if (row.op.find("matmul") != std::string::npos) sum.products += row.work.flops / kSteps;
      if (std::ranges::count(kLapack, row.op) > 0) sum.lapack += row.work.flops / kSteps;
    }
    return sum;
  }
};

/// What a step consists of, in the mean: where the time above its floor goes.
void print_parts(const Profile& profile) {
  for (const Profile::Row& row : profile.rows())
    fmt::print("    {:<32} {:>9.2f} {:>8.1f} {:>26.1f}  {} calls\n", row.op, 1e3 * row.seconds / kSteps,
               row.work.flops / kSteps / 1e9, row.work.bytes / kSteps / 1e6, row.calls / kSteps);
}

void bench(Context& ctx, const std::string& model, const std::vector<std::string>& rules, bool parts) {
  ParameterTable table(parse_model(model));
  HiddenMatrices::only_hidden(table);
  fmt::print("hidden matrices of {}, {:.1f}M parameters, {}; mean of {} steps, the best of {}\n", model,
             static_cast<double>(table.size()) / 1e6, describe_device(ctx), kSteps, kRounds);
  fmt::print("  {:<34} {:>9} {:>8} {:>8} {:>8} {:>9} {:>6} {:>9} {:>8}\n", "rule", "ms", "GFLOP", "LAPACK",
             "MB", "floor ms", "ratio", "GFLOP/s", "GB/s");
  for (const std::string& rule : rules) {
    RuleBench run(ctx, model, rule);
    const Profile profile = run.profile();
    const RuleBench::Flops flops = RuleBench::flops(profile);
    MachineRates rates{};
    std::array<double, kSteps> best;
    best.fill(std::numeric_limits<double>::infinity());
    double spent = 0;
    for (int64_t round = 0; round < kRounds && spent < kEnough; ++round) {
      const MachineRates now = measure_rates(ctx, kMoreThanCaches);
      rates = {.flops = std::max(rates.flops, now.flops), .bytes = std::max(rates.bytes, now.bytes)};
      for (size_t t = 0; t < kSteps; ++t) {
        const double took = run.seconds((2 + round) * kSteps + static_cast<int64_t>(t), 1);
        best[t] = std::min(best[t], took);
        spent += took;
      }
    }
    const double seconds = std::accumulate(best.begin(), best.end(), 0.0) / kSteps;
    const auto bytes = static_cast<double>(run.bytes());
    const double floor = (flops.products + 2 * flops.lapack) / rates.flops + bytes / rates.bytes;
    fmt::print("  {:<34} {:>9.2f} {:>8.1f} {:>8.1f} {:>8.1f} {:>9.2f} {:>6.2f} {:>9.0f} {:>8.1f}\n", rule,
               1e3 * seconds, flops.products / 1e9, flops.lapack / 1e9, bytes / 1e6, 1e3 * floor,
               seconds / floor, rates.flops / 1e9, rates.bytes / 1e9);
    if (parts) print_parts(profile);
    std::fflush(stdout);
  }
}
}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> models = {"gpt2-small", "gpt2"}, rules;
  MachineOptions machine;
  bool parts = false;
  CLI::App app("Time of every rule's step against its floor.", "bench_rules");
  app.add_option("--model", models, "presets");
  app.add_option("--rule", rules, "RULE[:key=value,...]; default: every rule with its default keys");
  app.add_flag("--parts", parts, "also the operations of a step");
  app.add_option("--threads", machine.threads);
  app.add_option("--device", machine.device);
  app.add_option("--dtype", machine.dtype);
  CLI11_PARSE(app, argc, argv);
  if (rules.empty())
    for (const RuleEntry& entry : rule_table()) rules.emplace_back(entry.name);
  Context ctx;
  use_device(ctx, machine);
  for (const std::string& model : models) bench(ctx, model, rules, parts);
  return 0;
}
