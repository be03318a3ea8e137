// Where the time of a training step goes, per phase and operation, against the floor of this machine: the
// time that the model's matrix products alone would take at the rate measured in the same run.
//
//   make bench                               the standard shapes
//   make bench BENCH='--model gpt2 --batch-size 4 --seq-len 256 --vocab 50257 --json'
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>

#include "model/flops.h"
#include "model/gpt.h"
#include "model/kernels/profile.h"
#include "optim/recipe.h"
#include "random.h"
#include "run_log.h"

namespace {
struct BenchOptions {
  std::string model;  // empty: the standard shapes
  int64_t batch_size = 4, seq_len = 256, vocab = 50257;
  std::string recipe = "adamw";
  int steps = 5, threads = 0;
  bool json = false;
};

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> values) {
  std::ranges::nth_element(values, values.begin() + static_cast<int64_t>(values.size() / 2));
  return values[values.size() / 2];
}

/// A model, its optimizer and random tokens.
struct Bench {
  const BenchOptions& options;
  Context ctx;
  Gpt model;
  Optimizer optimizer;
  std::vector<int32_t> inputs, targets;

  static ModelConfig config(const BenchOptions& o) {
    ModelConfig config = parse_model(o.model);
    config.V = o.vocab;
    return config;
  }
  static Context& on_cpu(Context& ctx, int threads) {
    use_cpu(ctx, threads);
    return ctx;
  }
  explicit Bench(const BenchOptions& o)
      : options(o),
        model(on_cpu(ctx, o.threads), config(o), o.batch_size * o.seq_len, /*training=*/true),
        optimizer(ctx, model.parameters(), matching_rules(model.parameters(), o.recipe)) {
    model.allocate();
    optimizer.allocate();
    model.parameters().initialize(1);
    Random random(1);
    for (int64_t i = 0; i < o.batch_size * o.seq_len; ++i) {
      inputs.push_back(static_cast<int32_t>(random.uniform() * static_cast<double>(o.vocab)));
      targets.push_back(static_cast<int32_t>(random.uniform() * static_cast<double>(o.vocab)));
    }
  }
  static OptimizerOptions matching_rules(const ParameterTable& table, const std::string& recipe) {
    OptimizerOptions rules = recipe_options(recipe);
    std::erase_if(rules.rules, [&](const auto& rule) {
      return std::ranges::none_of(table, [&](const Parameter& p) { return p.role == rule.first; });
    });
    return rules;
  }
  void run();
};

void print_rows(const Profile& profile, int steps, double peak_flops) {
  double total = 0;
  for (const Profile::Row& row : profile.rows()) total += row.seconds;
  fmt::print("  {:<10} {:<24} {:>6} {:>9} {:>6} {:>9} {:>7} {:>8}\n", "phase", "operation", "calls",
             "ms/step", "%", "GFLOP/s", "of peak", "GB/s");
  for (const Profile::Row& row : profile.rows()) {
    const double flops = row.work.flops / row.seconds;
    fmt::print("  {:<10} {:<24} {:>6} {:>9.2f} {:>6.1f} {:>9} {:>7} {:>8}\n", row.phase, row.op,
               row.calls / steps, 1e3 * row.seconds / steps, 100 * row.seconds / total,
               row.work.flops > 0 ? fmt::format("{:.0f}", flops / 1e9) : "-",
               row.work.flops > 0 ? fmt::format("{:.0f} %", 100 * flops / peak_flops) : "-",
               row.work.flops > 0 || row.work.bytes == 0
                   ? "-"
                   : fmt::format("{:.1f}", row.work.bytes / row.seconds / 1e9));
  }
}

void Bench::run() {
  Profile profile;
  std::vector<double> model_seconds, optimizer_seconds, rates;
  const Shape shape{options.batch_size, options.seq_len};
  const int warmup = 1;
  for (int step = 0; step < options.steps + warmup; ++step) {
    rates.push_back(measure_peak_flops(ctx));  // beside every step, so that a drifting machine drifts in both
    ctx.profile = step < warmup ? nullptr : &profile;
    const double start = seconds_now();
    model.forward_backward(Tensor(inputs.data(), shape), Tensor(targets.data(), shape), 1.0, false);
    const double middle = seconds_now();
    ctx.begin_phase("optimizer");
    optimizer.step(step, 0);
    const double end = seconds_now();
    ctx.profile = nullptr;
    if (step < warmup) continue;
    model_seconds.push_back(middle - start);
    optimizer_seconds.push_back(end - middle);
  }
  const int64_t tokens = options.batch_size * options.seq_len;
  const double flops = train_flops_per_token(model.config(), options.seq_len) * static_cast<double>(tokens);
  const double peak = median(rates), forward_backward = median(model_seconds),
               update = median(optimizer_seconds);
  const double floor = flops / peak;
  if (options.json) {
    const nlohmann::ordered_json line = {{"model", options.model},
                                         {"batch_size", options.batch_size},
                                         {"seq_len", options.seq_len},
                                         {"vocab", options.vocab},
                                         {"recipe", options.recipe},
                                         {"forward_backward_ms", 1e3 * forward_backward},
                                         {"optimizer_ms", 1e3 * update},
                                         {"peak_gflops", peak / 1e9},
                                         {"share_of_floor", floor / forward_backward},
                                         {"peak_rss_mb", peak_rss_mb()}};
    fmt::print("{}\n", line.dump());
    return;
  }
  fmt::print(
      "{} {}x{} V={} {}: forward+backward {:.1f} ms, {} {:.1f} ms, {:.0f} tokens/s, peak memory {:.0f} MiB\n",
      options.model, options.batch_size, options.seq_len, options.vocab,
      fmt::format("({} threads)", ctx.threads), 1e3 * forward_backward, options.recipe, 1e3 * update,
      static_cast<double>(tokens) / (forward_backward + update), peak_rss_mb());
  fmt::print(
      "  floor: {:.1f} GFLOP at {:.0f} GFLOP/s (1024^3 products, this run) = {:.1f} ms; share of the floor "
      "{:.0f} %\n",
      flops / 1e9, peak / 1e9, 1e3 * floor, 100 * floor / forward_backward);
  print_rows(profile, options.steps, peak);
}
}  // namespace

int main(int argc, char** argv) {
  BenchOptions o;
  CLI::App app("Time of a training step per operation, against this machine's matrix-product floor.",
               "bench");
  app.add_option("--model", o.model,
                 "preset[:key=value,...]; without it, the standard shapes one after another");
  app.add_option("--batch-size", o.batch_size)->check(CLI::PositiveNumber);
  app.add_option("--seq-len", o.seq_len)->check(CLI::PositiveNumber);
  app.add_option("--vocab", o.vocab)->check(CLI::PositiveNumber);
  app.add_option("--recipe", o.recipe);
  app.add_option("--steps", o.steps)->check(CLI::PositiveNumber);
  app.add_option("--threads", o.threads);
  app.add_flag("--json", o.json, "one line of JSON");
  CLI11_PARSE(app, argc, argv);
  if (!o.model.empty()) {
    Bench(o).run();
    return 0;
  }
  for (const auto& [model, vocab] : {std::pair{"gpt2", 50257}, {"gpt2-small", 50257}, {"gpt2-small", 257}}) {
    for (const int64_t seq_len : {64, 256}) {
      o.model = model;
      o.vocab = vocab;
      o.seq_len = seq_len;
      Bench(o).run();
      fmt::print("\n");
    }
  }
  return 0;
}
