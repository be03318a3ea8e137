// Where the time of a training step goes, per phase and operation, against the floor of this machine: the
// time that the model's matrix products alone would take at the rate measured in the same run, and with its
// memory traffic added.
//
//   make bench                               the standard shapes
//   make bench BENCH='--model gpt2 --batch-size 4 --seq-len 256 --vocab 50257 --json'
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>

#include "json_text.h"
#include "model/flops.h"
#include "model/gpt.h"
#include "model/kernels/profile.h"
#include "optim/recipe.h"
#include "random.h"
#include "run_log.h"
#include "setup.h"

namespace {
struct BenchOptions {
  std::string model;  // empty: the standard shapes
  int64_t batch_size = 4, seq_len = 256, vocab = 50257;
  std::string recipe = "adamw";
  MachineOptions machine;
  int steps = 5;
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
  TokenBatch batch;
  double middle = 0;  // between the model and the optimizer of the last step

  static ModelConfig config(const BenchOptions& o) {
    ModelConfig config = parse_model(o.model);
    config.V = o.vocab;
    return config;
  }
  static Context& on(Context& ctx, const MachineOptions& machine) {
    use_device(ctx, machine);
    return ctx;
  }
  explicit Bench(const BenchOptions& o)
      : options(o),
        model(on(ctx, o.machine), config(o), o.batch_size * o.seq_len, /*training=*/true),
        optimizer(ctx, model.parameters(), matching_rules(model.parameters(), o.recipe)) {
    model.allocate();
    optimizer.allocate();
    model.parameters().initialize(1);
    Random random(1);
    std::vector<int32_t> inputs, targets;
    for (int64_t i = 0; i < o.batch_size * o.seq_len; ++i) {
      inputs.push_back(static_cast<int32_t>(random.uniform() * static_cast<double>(o.vocab)));
      targets.push_back(static_cast<int32_t>(random.uniform() * static_cast<double>(o.vocab)));
    }
    batch = model.stage(inputs.data(), targets.data(), 1, {o.batch_size, o.seq_len})[0];
  }
  static OptimizerOptions matching_rules(const ParameterTable& table, const std::string& recipe) {
    OptimizerOptions rules = recipe_options(recipe);
    std::erase_if(rules.rules, [&](const auto& rule) {
      return std::ranges::none_of(table, [&](const Parameter& p) { return p.role == rule.first; });
    });
    return rules;
  }
  struct Figures;
  void make_step(int step, bool wait);
  Figures measure();
  Profile profile();
  void run();
};

nlohmann::ordered_json rows_json(const Profile& profile) {
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const Profile::Row& row : profile.rows())
    rows.push_back({{"phase", row.phase},
                    {"op", row.op},
                    {"calls", row.calls},
                    {"seconds", row.seconds},
                    {"flops", row.work.flops},
                    {"bytes", row.work.bytes}});
  return rows;
}

void print_rows(const Profile& profile, int steps, const MachineRates& rates) {
  double total = 0;
  for (const Profile::Row& row : profile.rows()) total += row.seconds;
  fmt::print("  {:<10} {:<24} {:>6} {:>9} {:>6} {:>9} {:>8} {:>7}\n", "phase", "operation", "calls",
             "ms/step", "%", "GFLOP/s", "GB/s", "of peak");
  for (const Profile::Row& row : profile.rows()) {
    const double flops = row.work.flops / row.seconds, bytes = row.work.bytes / row.seconds;
    const bool counted = row.work.flops > 0 || row.work.bytes > 0;
    const double share = row.work.flops > 0 ? flops / rates.flops : bytes / rates.memory.bytes;
    fmt::print("  {:<10} {:<24} {:>6} {:>9.2f} {:>6.1f} {:>9} {:>8} {:>7}\n", row.phase, row.op,
               row.calls / steps, 1e3 * row.seconds / steps, 100 * row.seconds / total,
               row.work.flops > 0 ? fmt::format("{:.0f}", flops / 1e9) : "-",
               row.work.flops > 0 || !counted ? "-" : fmt::format("{:.1f}", bytes / 1e9),
               counted ? fmt::format("{:.0f} %", 100 * share) : "-");
  }
}

/// Medians over the steps of one run.
struct Bench::Figures {
  MachineRates rates;
  double forward_backward, optimizer;  // seconds, waited for one by one
  double step;                         // seconds of a whole step when nothing waits between steps
  double enqueue;                      // of these, what the host needs to enqueue it; on the CPU all of them
};

void Bench::make_step(int step, bool wait) {
  model.enqueue_forward_backward(batch, {});
  if (wait) ctx.synchronize();
  middle = seconds_now();
  ctx.begin_phase("optimizer");
  optimizer.step(step, 0);
  if (wait) ctx.synchronize();
}

/// The first steps warm up: pages, caches, clocks, the choice of algorithms.
Bench::Figures Bench::measure() {
  constexpr int kWarmUp = 1;
  std::vector<double> model_seconds, optimizer_seconds, flops, bytes;
  for (int step = 0; step < options.steps + kWarmUp; ++step) {
    if (ctx.where == Where::cpu ||
        step == 0) {  // beside every step, so that a drifting machine drifts in both
      const MachineRates rates = measure_rates(ctx, kMoreThanCaches);
      flops.push_back(rates.flops), bytes.push_back(rates.memory.bytes);
    }
    const double start = seconds_now();
    make_step(step, /*wait=*/true);
    const double end = seconds_now();
    if (step < kWarmUp) continue;
    model_seconds.push_back(middle - start);
    optimizer_seconds.push_back(end - middle);
  }
  StepGraph graph(ctx, optimizer.capturable());
  graph.run([&] { make_step(0, false); });
  ctx.synchronize();
  const double start = seconds_now();
  std::vector<double> enqueue_seconds;
  for (int step = 0; step < options.steps; ++step) {
    const double begin = seconds_now();
    graph.run([&] { make_step(step, false); });
    enqueue_seconds.push_back(seconds_now() - begin);
  }
  ctx.synchronize();
  return {.rates = {median(flops), {.bytes = median(bytes)}},
          .forward_backward = median(model_seconds),
          .optimizer = median(optimizer_seconds),
          .step = (seconds_now() - start) / options.steps,
          .enqueue = median(enqueue_seconds)};
}

Profile Bench::profile() {
  Profile profile;
  ctx.profile = &profile;
  for (int step = 0; step < options.steps; ++step) make_step(step, false);
  ctx.profile = nullptr;
  return profile;
}

void Bench::run() {
  const Figures f = measure();
  const int64_t T = options.seq_len, tokens = options.batch_size * T;
  const double flops = train_flops_per_token(model.config(), T) * static_cast<double>(tokens);
  const double products = flops / f.rates.flops;
  const double light = floor_seconds(model.config(), T, ctx.dtype, tokens, f.rates);
  const double speed = static_cast<double>(tokens) / f.step;
  if (options.json) {
    const nlohmann::ordered_json line = {{"model", options.model},
                                         {"batch_size", options.batch_size},
                                         {"seq_len", T},
                                         {"vocab", options.vocab},
                                         {"recipe", options.recipe},
                                         {"device", describe_device(ctx)},
                                         {"forward_backward_ms", 1e3 * f.forward_backward},
                                         {"optimizer_ms", 1e3 * f.optimizer},
                                         {"step_ms", 1e3 * f.step},
                                         {"enqueue_ms", 1e3 * f.enqueue},
                                         {"tokens_per_second", speed},
                                         {"peak_gflops", f.rates.flops / 1e9},
                                         {"copy_gb_per_second", f.rates.memory.bytes / 1e9},
                                         {"share_of_floor", products / f.forward_backward},
                                         {"speed_of_light", light / f.forward_backward},
                                         {"peak_rss_mb", peak_rss_mb()},
                                         {"phases", rows_json(profile())}};
    fmt::print("{}\n", json_text(line));
    return;
  }
  fmt::print(
      "{} {}x{} V={}, {}: forward+backward {:.1f} ms, {} {:.1f} ms; {:.1f} ms a step, {:.0f} tokens/s, peak "
      "memory of the "
      "host {:.0f} MiB\n",
      options.model, options.batch_size, T, options.vocab, describe_device(ctx), 1e3 * f.forward_backward,
      options.recipe, 1e3 * f.optimizer, 1e3 * f.step, speed, peak_rss_mb());
  fmt::print(
      "  floor: {:.1f} GFLOP at {:.0f} GFLOP/s (products, this run) = {:.1f} ms, share {:.0f} %; with the "
      "memory traffic at "
      "{:.0f} GB/s {:.1f} ms, share {:.0f} %\n",
      flops / 1e9, f.rates.flops / 1e9, 1e3 * products, 100 * products / f.forward_backward,
      f.rates.memory.bytes / 1e9, 1e3 * light, 100 * light / f.forward_backward);
  print_rows(profile(), options.steps, f.rates);
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
  app.add_option("--threads", o.machine.threads);
  app.add_option("--device", o.machine.device);
  app.add_option("--dtype", o.machine.dtype);
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
