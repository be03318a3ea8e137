// Time of every rule's step on the hidden matrices of a model, against what its arithmetic and its memory
// traffic take at this machine's rates:
//
//   floor = products' FLOPs / rate of a large product + LAPACK's FLOPs / half that rate
//         + memory_seconds (rates.h) of the bytes read and of the bytes written
//
// LAPACK works in float64. Eigenvectors are not made of products, though: so of a rule that calls LAPACK the
// time in these calls is printed, too, the rate that it reached, and what is around them against the floor of
// that alone; and once per model the rates that LAPACK reaches by itself, at sides of the model's channels
// and at dion's rank, a quarter of them. FLOPs are 2 M N K of every product that the rule makes, symmetric
// ones in full (they cost half on the CPU, so that a rule can be faster than its floor). Bytes: gradient read
// twice (once for the global norm), weight and every tensor of state read and written once. Rules refresh
// roots and bases now and then, so a round is as many steps as that takes, and its mean counts. Memory may
// change its speed within seconds: passes over it are timed between the steps of every round, products before
// and after it, and their mean is held against the mean step. The round of the median ratio is what is
// printed.
//
// `memory` is the share of the rate of passes in place that the step's bytes, read plus written, reach: lower
// than 1 / ratio for rules that read more than they write, as all do.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dev/hidden_matrices.h"
#include "dev/lapack_alone.h"
#include "model/rates.h"
#include "setup.h"

namespace {
constexpr std::string_view kLapack[] = {"symmetric_eigen", "inverse_root_eigen", "qr"};
constexpr int kRounds = 9;      // at most,
constexpr double kEnough = 20;  // and no new one after this many seconds

struct BenchOptions {
  std::vector<std::string> models = {"gpt2-small", "gpt2"}, rules;
  int64_t steps = 10;  // of a round
  bool parts = false;
};

struct RuleBench : HiddenMatrices {
  using HiddenMatrices::HiddenMatrices;
  struct Traffic {
    double read = 0, written = 0;  // bytes of a step
    double all() const { return read + written; }
  };
  Traffic traffic() const {
    int64_t state = 0;
    for (const RowInfo& row : optimizer.describe()) state += row.state_bytes;
    const int64_t weights = table.size() * int64_t{sizeof(float)};
    return {.read = static_cast<double>(3 * weights + state),
            .written = static_cast<double>(weights + state)};
  }
  /// The operations of a round of steps after the first round: a rule may begin with what it never does again
  /// (soap with eigenvectors, dion with a basis), and times are measured later, too.
  Profile profile(int64_t steps) {
    for (int64_t t = 0; t < steps; ++t) optimizer.step(t, 0);
    Profile profile;
    ctx.profile = &profile;
    for (int64_t t = steps; t < 2 * steps; ++t) optimizer.step(t, 0);
    ctx.profile = nullptr;
    return profile;
  }
  /// FLOPs of a step, in the mean.
  struct Flops {
    double products = 0, lapack = 0;
  };
  static Flops flops(const Profile& profile, int64_t steps) {
    Flops sum;
    for (const Profile::Row& row : profile.rows()) {
      const double work = row.work.flops / static_cast<double>(steps);
      if (row.op.find("matmul") != std::string::npos) sum.products += work;
      if (std::ranges::count(kLapack, row.op) > 0) sum.lapack += work;
    }
    return sum;
  }
};

/// A mean step and what it would take at the rates of that moment.
struct Round {
  double seconds, floor;
  double in_lapack, lapack_floor;  // the part of each that is LAPACK's
  MachineRates rates;
  double ratio() const { return seconds / floor; }
};

/// The mean of steps from `first` on, each followed by passes over memory.
Round measure_round(RuleBench& run, MemoryPasses& passes, int64_t first, int64_t steps, bool lapack) {
  double seconds = 0, per_byte = 0, per_read = 0, in_lapack = 0;
  Profile profile;
  for (int64_t t = 0; t < steps; ++t) {
    run.ctx.profile = lapack ? &profile : nullptr;
    seconds += run.seconds(first + t, 1);
    run.ctx.profile = nullptr;
    const MemoryRates rates = passes.measure();
    per_byte += 1 / rates.bytes, per_read += 1 / rates.reads;
  }
  for (const Profile::Row& row : profile.rows())
    if (std::ranges::count(kLapack, row.op) > 0) in_lapack += row.seconds;
  const auto n = static_cast<double>(steps);
  return {.seconds = seconds / n,
          .floor = 0,
          .in_lapack = in_lapack / n,
          .lapack_floor = 0,
          .rates = {.memory = {.bytes = n / per_byte, .reads = n / per_read}}};
}

std::vector<Round> measure(RuleBench& run, const RuleBench::Flops& flops, int64_t steps) {
  std::vector<Round> rounds;
  MemoryPasses passes(run.ctx, kMoreThanCaches);
  passes.measure();  // touches its pages
  const RuleBench::Traffic traffic = run.traffic();
  double before = measure_product_rate(run.ctx), spent = 0;
  for (int64_t k = 0; k < kRounds && spent < kEnough; ++k) {
    Round round = measure_round(run, passes, (2 + k) * steps, steps, flops.lapack > 0);
    const double after = measure_product_rate(run.ctx);
    round.rates.flops = (before + after) / 2;
    round.lapack_floor = 2 * flops.lapack / round.rates.flops;
    round.floor = flops.products / round.rates.flops + round.lapack_floor +
                  memory_seconds(round.rates.memory, traffic.read, traffic.written);
    before = after;
    spent += round.seconds * static_cast<double>(steps);
    rounds.push_back(round);
  }
  std::ranges::sort(rounds, {}, &Round::ratio);
  return rounds;
}

/// What a step consists of, in the mean: where the time above its floor goes.
void print_parts(const Profile& profile, int64_t steps) {
  const auto n = static_cast<double>(steps);
  for (const Profile::Row& row : profile.rows())
    fmt::print("    {:<32} {:>9.2f} {:>8.1f} {:>26.1f}  {} calls\n", row.op, 1e3 * row.seconds / n,
               row.work.flops / n / 1e9, row.work.bytes / n / 1e6, row.calls / steps);
}

void print_lapack(const RuleBench::Flops& flops, const Round& round) {
  const double around = round.seconds - round.in_lapack, floor = round.floor - round.lapack_floor;
  fmt::print("    in LAPACK {:.2f} ms, {:.0f} GFLOP/s; around it {:.2f} ms, floor {:.2f} ms, ratio {:.2f}\n",
             1e3 * round.in_lapack, flops.lapack / round.in_lapack / 1e9, 1e3 * around, 1e3 * floor,
             around / floor);
}

/// At sides of C, if the memory is the CPU's.
void print_lapack_alone(Context& ctx, int64_t C) {
  if (ctx.where != Where::cpu) return;
  LapackAlone alone(ctx);
  const int64_t rank = std::max<int64_t>(C / 4, 1);
  fmt::print(
      "  LAPACK alone, {} at a time: eigenvectors of {} {:.0f} GFLOP/s, QR of ({}, {}) {:.0f}, of ({}, {}) "
      "{:.0f}\n",
      ctx.threads, C, alone.eigen(C) / 1e9, C, C, alone.qr(C, C) / 1e9, C, rank, alone.qr(C, rank) / 1e9);
}

void bench(Context& ctx, const std::string& model, const BenchOptions& options) {
  ParameterTable table(parse_model(model));
  HiddenMatrices::only_hidden(table);
  fmt::print(
      "hidden matrices of {}, {:.1f}M parameters, {}; the median of {} rounds of {} steps, ratios of all\n",
      model, static_cast<double>(table.size()) / 1e6, describe_device(ctx), kRounds, options.steps);
  fmt::print("  {:<34} {:>9} {:>8} {:>8} {:>8} {:>9} {:>6} {:>14} {:>9} {:>8} {:>8} {:>7}\n", "rule", "ms",
             "GFLOP", "LAPACK", "MB", "floor ms", "ratio", "from to", "GFLOP/s", "GB/s", "reads", "memory");
  bool lapack = false;
  for (const std::string& rule : options.rules) {
    RuleBench run(ctx, model, rule);
    const Profile profile = run.profile(options.steps);
    const RuleBench::Flops flops = RuleBench::flops(profile, options.steps);
    const std::vector<Round> rounds = measure(run, flops, options.steps);
    const Round& median = rounds[(rounds.size() - 1) / 2];
    const double bytes = run.traffic().all();
    fmt::print(
        "  {:<34} {:>9.2f} {:>8.1f} {:>8.1f} {:>8.1f} {:>9.2f} {:>6.2f} {:>14} {:>9.0f} {:>8.1f} {:>8.1f} "
        "{:>5.0f} %\n",
        rule, 1e3 * median.seconds, flops.products / 1e9, flops.lapack / 1e9, bytes / 1e6, 1e3 * median.floor,
        median.ratio(), fmt::format("{:.2f} {:.2f}", rounds.front().ratio(), rounds.back().ratio()),
        median.rates.flops / 1e9, median.rates.memory.bytes / 1e9, median.rates.memory.reads / 1e9,
        100 * bytes / median.rates.memory.bytes / median.seconds);
    if (flops.lapack > 0 && !std::exchange(lapack, true)) print_lapack_alone(ctx, table.rows()[0].shape[1]);
    if (flops.lapack > 0) print_lapack(flops, median);
    if (options.parts) print_parts(profile, options.steps);
    std::fflush(stdout);
  }
}
}  // namespace

int main(int argc, char** argv) {
  BenchOptions options;
  MachineOptions machine;
  CLI::App app("Time of every rule's step against its floor.", "bench_rules");
  app.add_option("--model", options.models, "presets");
  app.add_option("--rule", options.rules, "RULE[:key=value,...]; default: every rule with its default keys");
  app.add_option("--steps", options.steps,
                 "of a round; less than 10 leave out what some rules do every tenth")
      ->check(CLI::PositiveNumber);
  app.add_flag("--parts", options.parts, "also the operations of a step");
  app.add_option("--threads", machine.threads);
  app.add_option("--device", machine.device);
  app.add_option("--dtype", machine.dtype);
  CLI11_PARSE(app, argc, argv);
  if (options.rules.empty())
    for (const RuleEntry& entry : rule_table()) options.rules.emplace_back(entry.name);
  Context ctx;
  use_device(ctx, machine);
  for (const std::string& model : options.models) bench(ctx, model, options);
  return 0;
}
