// train_gpt: trains GPT models from scratch; every tensor moves by steepest descent under a norm that fits
// its role.
//
//   options -> device -> data -> model -> optimizer -> loop
//
// This file is the whole program at a glance. Plain C++: it also compiles without CUDA.
#include <fmt/format.h>

#include <new>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "error.h"
#include "files.h"
#include "interrupt.h"
#include "model/checkpoint.h"
#include "norms_report.h"
#include "plan.h"
#include "polar_tool.h"
#include "setup.h"
#include "training.h"

namespace {
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
  Training run{options,  tokenizer.get(), identity,  rates,
               model,    optimizer,       exchange,  telemetry,
               qk_clip ? &*qk_clip : nullptr,
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
