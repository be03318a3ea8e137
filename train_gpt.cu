// train_gpt: trains GPT models from scratch; every tensor moves by steepest descent under a norm that fits
// its role.
//
//   options -> device -> data -> model -> optimizer -> loop
//
// This file is the whole program at a glance. Plain C++: it also compiles without CUDA.
#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <deque>
#include <new>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "error.h"
#include "files.h"
#include "interrupt.h"
#include "model/checkpoint.h"
#include "model/flops.h"
#include "model/generate.h"
#include "model/kernels/readback.h"
#include "norms_report.h"
#include "plan.h"
#include "polar_tool.h"
#include "run_log.h"
#include "setup.h"

namespace {
double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// The parts of a run, and what it does with them between the first step and the last. A GPU works a step
/// behind: while it makes one, the next is enqueued, so numbers of a step are read, logged and judged when
/// they come.
struct Run {
  const TrainOptions& options;
  const Tokenizer* tokenizer;     // null for shards that came without one
  const nlohmann::json identity;  // what a resumed run must agree on
  const MachineRates rates;       // of this machine, measured at the start
  Gpt& model;
  Optimizer& optimizer;
  Telemetry& telemetry;
  QkClip* const qk_clip;  // null without --qk-clip
  BatchReader& batches;
  const Loader& val_data;  // one row at a time
  RunLog& log;
  Progress& progress;
  RunState state;  // of the steps whose numbers have come

  StepGraph graph{model.context(), optimizer.capturable()};
  Readback losses{model.context(), 1};
  struct Enqueued {
    int64_t step, loss, report, clip;  // tickets of what it will say
    double start;
  };
  std::deque<Enqueued> enqueued = {};
  double last_end = 0;                  // when the last step's numbers came
  std::optional<StepNorms> norms = {};  // of the last measured step

  int64_t next_step() const { return state.step + static_cast<int64_t>(enqueued.size()); }
  bool due(int64_t every) const { return every > 0 && next_step() % every == 0; }
  void enqueue_step();
  void finish_steps(size_t leave);
  void finish(const Enqueued& step);
  void measure(int64_t step, const std::function<void()>& gradients, const std::function<void(bool)>& update);
  void validate();
  void sample();
  void checkpoint();
};

/// One update: gradients of grad_accum micro-batches, then the optimizer.
void Run::enqueue_step() {
  const int64_t step = next_step();
  const double start = seconds_now();
  const BatchReader::Batch global = batches.next();
  const std::vector<TokenBatch> micro =
      model.stage(global.inputs, global.targets, options.grad_accum, {options.batch_size, options.seq_len});
  const auto gradients = [&] {
    for (size_t i = 0; i < micro.size(); ++i)
      model.enqueue_forward_backward(micro[i], 1.0 / static_cast<double>(micro.size()), /*accumulate=*/i > 0);
  };
  const auto update = [&](bool keep_directions) {
    optimizer.step(step, options.steps, keep_directions);
    if (qk_clip != nullptr) qk_clip->step(optimizer.guard());
    losses.fetch(model.loss());
  };
  if (telemetry.due(step)) {
    measure(step, gradients, update);
  } else {
    graph.run([&] {
      gradients();
      update(/*keep_directions=*/false);
    });
  }
  enqueued.push_back(
      {step, losses.mark(), optimizer.mark(), qk_clip != nullptr ? qk_clip->mark() : -1, start});
}

/// The same step with telemetry, which waits.
void Run::measure(int64_t step, const std::function<void()>& gradients,
                  const std::function<void(bool)>& update) {
  finish_steps(0);  // so that the log stays in order
  norms = telemetry.measure({.t = step,
                             .gradients =
                                 [&] {
                                   gradients();
                                   return OnHost(model.context(), model.loss())->f64()[0];
                                 },
                             .update = [&] { update(/*keep_directions=*/true); }});
  log.write(norms_line(*norms));
}

/// Waits for the steps that were enqueued, all but the newest `leave`.
void Run::finish_steps(size_t leave) {
  for (; enqueued.size() > leave; enqueued.pop_front(), ++state.step) finish(enqueued.front());
}

void Run::finish(const Enqueued& step) {
  const double loss = losses.wait(step.loss)[0];
  if (!std::isfinite(loss)) throw not_finite(model.parameters(), step.step, options.out);
  StepReport report;
  try {
    report = optimizer.report(step.report);
  } catch (const RunError& error) {
    throw RunError(fmt::format("{}; {}", error.what(), resume_advice(options.out)));
  }
  const double end = seconds_now(), seconds = end - std::max(step.start, last_end);
  last_end = end;
  state.train_seconds += seconds;
  const int64_t tokens = options.tokens_per_step();
  const double speed = static_cast<double>(tokens) / seconds;
  const double flops = train_flops_per_token(model.config(), options.seq_len) * speed;
  const double floor = floor_seconds(model.config(), options.seq_len, model.context().dtype, tokens, rates);
  nlohmann::ordered_json line = {{"type", "train"},
                                 {"step", step.step},
                                 {"tokens", step.step * tokens},
                                 {"loss", loss},
                                 {"grad_norm", report.grad_norm},
                                 {"lr", report.lr},
                                 {"step_ms", seconds * 1e3},
                                 {"tokens_per_second", speed},
                                 {"mfu", flops / rates.flops},
                                 {"speed_of_light", floor / seconds}};
  if (qk_clip != nullptr) line["max_logit"] = qk_clip->max_logit(step.clip);
  if (report.eta > 0) line["eta"] = report.eta;
  log.write(line);
  progress.update({step.step + 1, loss, state.val_loss, speed});
}

/// The mean loss over the first --val-tokens of the validation data, in whole rows.
void Run::validate() {
  const int64_t rows = std::clamp<int64_t>(options.val_tokens / options.seq_len, 1, val_data.chunks());
  state.val_loss = mean_loss(model, val_data, rows, options.batch_size);
  if (!std::isfinite(state.val_loss)) throw not_finite(model.parameters(), state.step, options.out);
  log.write({{"type", "val"},
             {"step", state.step},
             {"tokens", state.step * options.tokens_per_step()},
             {"loss", state.val_loss}});
  progress.say(fmt::format("step {}/{}  validation loss {:.6f} over {} tokens", state.step, options.steps,
                           state.val_loss, rows * options.seq_len));
}

/// Text from the model as it is now, begun by an end-of-text token: the start of a document.
void Run::sample() {
  if (tokenizer == nullptr) return;
  const std::vector<int32_t> drawn = generate(model, {tokenizer->end_of_text()},
                                              {.tokens = options.sample_tokens,
                                               .seed = options.seed,
                                               .end_of_text = tokenizer->end_of_text(),
                                               .context = options.seq_len});
  const std::string text = valid_utf8(tokenizer->decode(drawn));
  log.write({{"type", "sample"}, {"step", state.step}, {"text", text}});
  progress.say(fmt::format("--- sample after step {} ---\n{}\n---", state.step, text));
}

void Run::checkpoint() {
  const std::vector<NamedTensor> optimizer_state = optimizer.state();
  const std::string folder =
      save_checkpoint({.out = options.out,
                       .step = state.step,
                       .config = model.config(),
                       .parameters = model.parameters(),
                       .optimizer = optimizer_state,
                       .state = state_to_json(state, options, identity),
                       .tokenizer = tokenizer != nullptr ? tokenizer->json() : "",
                       .end_of_text = tokenizer != nullptr ? tokenizer->end_of_text() : -1,
                       .keep = options.keep,
                       .existing = Existing::replace});
  log.write({{"type", "checkpoint"}, {"step", state.step}, {"path", folder}});
}

int train(const TrainOptions& options) {
  make_folder(options.out);
  const FolderLock lock(options.out);  // one process at a time writes there
  const std::optional<std::string> resume_from = checkpoint_to_resume(options);
  World world(find_launch());
  Context ctx;
  use_device(ctx, options.machine, world);
  const MachineRates rates = measure_rates(ctx);

  const std::unique_ptr<Tokenizer> tokenizer = find_tokenizer(options.train);
  const ModelConfig config = choose_model(options, tokenizer.get());
  const Shards train_shards(options.train, config.V), val_shards(options.val, config.V);
  const Loader train_data(
      train_shards,
      {.rows = options.rows(), .T = options.seq_len, .shuffle = options.shuffle, .seed = options.seed});
  const Loader val_data(val_shards, {.rows = 1, .T = options.seq_len});

  const QkClipOptions clip_options = choose_qk_clip(options);
  Gpt model(ctx, config, options.batch_size * options.seq_len, /*training=*/true, options.grad_accum,
            /*watch_logits=*/clip_options.on());
  const OptimizerOptions rules = choose_optimizer(options, model.parameters());
  Optimizer optimizer(ctx, model.parameters(), rules);
  Telemetry telemetry(ctx, model.parameters(), optimizer, options.norms_every);
  print_plan(options, model, optimizer, telemetry);
  expect_memory(options, model, optimizer, telemetry);
  model.allocate();
  optimizer.allocate();
  telemetry.allocate();
  std::optional<QkClip> qk_clip;
  if (clip_options.on()) qk_clip.emplace(ctx, model.parameters(), model.max_logits(), clip_options);

  const nlohmann::json identity = run_identity(options, config, rules, train_shards.fingerprint());
  RunState state;
  if (resume_from) {
    state = state_from_json(load_state(*resume_from), identity, *resume_from);
    load_parameters(*resume_from, model.parameters());
    load_optimizer(*resume_from, optimizer.state());
    fmt::print("resuming after step {} from {}\n", state.step, *resume_from);
  } else if (options.init.empty()) {
    model.parameters().initialize(options.seed);
  } else {
    load_parameters(find_weights(options.init), model.parameters());
  }
  RunLog log = resume_from ? RunLog::resume(options.out, state.step) : RunLog::create(options.out);
  if (!resume_from) log.write(run_line(options, model, rules, rates));
  Progress progress(state.step, options.steps);
  BatchReader batches(train_data, state.step);
  Run run{options, tokenizer.get(), identity,  rates,
          model,   optimizer,       telemetry, qk_clip ? &*qk_clip : nullptr,
          batches, val_data,        log,       progress,
          state};

  const InterruptGuard interrupt;
  const size_t behind =
      ctx.where == Where::gpu ? 1 : 0;  // steps that may be on their way while the next is enqueued
  int64_t saved = resume_from ? state.step : -1;
  if (!resume_from) run.validate();
  while (run.next_step() < options.steps && !interrupt.requested()) {
    run.enqueue_step();
    const bool last = run.next_step() == options.steps;
    const bool validate = last || run.due(options.val_every), sample = run.due(options.sample_every),
               save = last || run.due(options.checkpoint_every);
    run.finish_steps(validate || sample || save ? 0 : behind);
    if (validate) run.validate();
    if (sample) run.sample();
    if (save) {
      run.checkpoint();
      saved = run.state.step;
    }
  }
  run.finish_steps(0);
  progress.finish();
  if (run.state.step < options.steps) {
    if (saved != run.state.step) run.checkpoint();
    fmt::print(
        "interrupted after step {}; the checkpoint is written: the same command with --resume continues\n",
        run.state.step);
    return 130;  // 128 + SIGINT, as shells expect
  }
  log.write({{"type", "end"},
             {"step", run.state.step},
             {"train_seconds", run.state.train_seconds},
             {"val_loss", run.state.val_loss},
             {"peak_rss_mb", peak_rss_mb()}});
  if (run.norms) fmt::print("{}", norms_table(*run.norms));
  fmt::print("done: {} steps in {} of training, validation loss {:.6f}, peak memory {:.0f} MiB\n",
             run.state.step, clock_text(run.state.train_seconds), run.state.val_loss, peak_rss_mb());
  return 0;
}

int run_command(const Options& options) {
  switch (options.command) {
    case Command::none:
      return 0;
    case Command::prepare:
      return run_prepare(options.prepare);
    case Command::train:
      return train(options.train);
    case Command::generate:
      return run_generate(options.generate);
    case Command::evaluate:
      return run_evaluate(options.evaluate);
    case Command::info:
      return run_info(options.train);
    case Command::polar:
      return run_polar(options.polar);
  }
  return 2;
}
}  // namespace

int main(int argc, char** argv) {
  const auto fail = [](const std::string& what, int status) {
    std::fflush(stdout);
    fmt::print(stderr, "train_gpt: error: {}\n", what);
    return status;
  };
  try {
    return run_command(parse_options({argv + 1, argv + argc}));
  } catch (const UsageError& error) {
    return fail(error.what(), 2);
  } catch (const std::bad_alloc&) {
    return fail("not enough memory, this machine, use a smaller model or batch", 1);
  } catch (const std::exception& error) {
    return fail(error.what(), 1);
  }
}
