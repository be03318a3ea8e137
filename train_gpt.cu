// train_gpt: trains GPT models from scratch; every tensor moves by steepest descent under a norm that fits
// its role.
//
//   options -> world -> device -> data -> model -> optimizer -> loop
//
// This file is the whole program at a glance. Plain C++: it also compiles without CUDA.
#include <fmt/format.h>

#include <functional>
#include <new>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "error.h"
#include "files.h"
#include "interrupt.h"
#include "model/checkpoint.h"
#include "model/kernels/together.h"
#include "norms_report.h"
#include "plan.h"
#include "polar_tool.h"
#include "setup.h"
#include "training.h"
#include "world/watch.h"
#include "world/world.h"

namespace {
constexpr const char* kNotEnoughMemory = "not enough memory, this machine, use a smaller model or batch";

/// The folder of the run; rank 0 holds it, so that no other job writes there meanwhile.
std::unique_ptr<FolderLock> hold_folder(const std::string& out, Comm& comm) {
  std::unique_ptr<FolderLock> lock;
  together(comm, [&] {
    if (comm.rank() != 0) return;
    make_folder(out);
    lock = std::make_unique<FolderLock>(out);
  });
  expect_shared(comm, out);
  return lock;
}

/// Weights and state as the run begins, or as the checkpoint left them.
RunState begin(const TrainOptions& options, const std::optional<std::string>& resume_from,
               const nlohmann::json& identity, Gpt& model, Optimizer& optimizer) {
  RunState state;
  together(*model.context().comm, [&] {
    if (resume_from) {
      state = state_from_json(load_state(*resume_from), identity, *resume_from);
      load_parameters(*resume_from, model.parameters());
      load_optimizer(*resume_from, optimizer.state());
    } else if (options.init.empty()) {
      model.parameters().initialize(options.seed);
    } else {
      load_parameters(find_weights(options.init), model.parameters());
    }
  });
  return state;
}

/// From the first step to the last, or to where a signal to one of them stops all ranks.
void run_steps(Training& run, const InterruptGuard& interrupt, int64_t saved) {
  // Steps that may be on their way while the next is enqueued.
  const size_t behind = run.model.context().where == Where::gpu ? 1 : 0;
  while (run.next_step() < run.options.steps) {
    if (interrupt.requested()) run.watch.request_stop();
    if (!run.watch.start_step(run.next_step())) break;
    run.enqueue_step();
    const bool last = run.next_step() == run.options.steps;
    const bool validate = last || run.due(run.options.val_every), sample = run.due(run.options.sample_every),
               save = last || run.due(run.options.checkpoint_every),
               verify = run.due(run.options.verify_every);
    run.finish_steps(validate || sample || save || verify ? 0 : behind);
    if (verify || save) run.verify();
    if (validate) run.validate();
    if (sample) run.sample();
    if (save) {
      run.checkpoint();
      saved = run.state.step;
    }
  }
  run.finish_steps(0);
  run.progress.finish();
  if (run.state.step < run.options.steps && saved != run.state.step) run.checkpoint();
}

/// What a job of one or more processes does, each of them.
int train(const TrainOptions& given, World& world, Watch& watch, const InterruptGuard& interrupt) {
  Context ctx;
  use_device(ctx, given.machine, world, [&] { watch.check(); });
  Comm& comm = *ctx.comm;
  const bool first = comm.rank() == 0;  // prints and logs
  const TrainOptions options = share_batch(given, comm.size());
  watch.agree(job_facts(options));
  const auto lock = hold_folder(options.out, comm);
  const std::optional<std::string> resume_from = checkpoint_to_resume(options, comm);

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
  Exchange exchange(ctx, model.parameters(), optimizer.owners());
  Telemetry telemetry(ctx, model.parameters(), optimizer, options.norms_every);
  if (first) print_plan(options, model, optimizer, telemetry);
  expect_memory(options, model, optimizer, telemetry);
  const MachineRates rates = measure_rates(ctx);
  model.allocate();
  optimizer.allocate();
  exchange.allocate();
  telemetry.allocate();
  std::optional<QkClip> qk_clip;
  if (clip_options.on()) qk_clip.emplace(ctx, model.parameters(), model.max_logits(), clip_options);
  model.watch(&exchange);
  optimizer.share({model.loss()});
  if (!qk_clip)  // which has the last word on weights
    optimizer.on_moved([&](std::span<const size_t> parameters) { exchange.send_early(parameters); });

  const nlohmann::json identity = run_identity(options, config, rules, train_shards.fingerprint());
  watch.agree(data_facts(identity, val_shards.fingerprint()));
  const RunState state = begin(options, resume_from, identity, model, optimizer);
  if (first && resume_from) fmt::print("resuming after step {} from {}\n", state.step, *resume_from);
  RunLog log = !first        ? RunLog::none()
               : resume_from ? RunLog::resume(options.out, state.step)
                             : RunLog::create(options.out);
  if (!resume_from) {
    nlohmann::ordered_json line = run_line(options, model, rules, rates);
    if (!comm.alone()) line["comm_bytes_formula"] = exchange.bytes_per_step();
    log.write(line);
  }
  Progress progress(state.step, options.steps, first);
  BatchReader batches(train_data, state.step, comm.rank() * options.rows_per_rank(), options.rows_per_rank());
  Training run{options,  tokenizer.get(), identity,
               rates,    model,           optimizer,
               exchange, telemetry,       qk_clip ? &*qk_clip : nullptr,
               batches,  val_data,        log,
               progress, watch,           state};

  if (!resume_from) run.validate();
  run_steps(run, interrupt, resume_from ? state.step : -1);
  if (run.state.step < options.steps) {
    if (first)
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
  if (first && run.norms) fmt::print("{}", norms_table(*run.norms));
  if (first)
    fmt::print("done: {} steps in {} of training, validation loss {:.6f}, peak memory {:.0f} MiB\n",
               run.state.step, clock_text(run.state.train_seconds), run.state.val_loss, peak_rss_mb());
  return 0;
}

/// One rank's part of a job: what goes wrong on a rank is told to all, and one of them says it.
int as_rank(double patience, const std::function<int(World&, Watch&, const InterruptGuard&)>& part) {
  const InterruptGuard interrupt;  // a launcher that misses one rank sends signals to the others
  World world(find_launch());
  Watch watch(world.rank(), world.size(), [&](const std::string& text) { return world.gather(text).front(); },
              {.patience = patience});
  try {
    return part(world, watch, interrupt);
  } catch (const UsageError& error) {
    watch.fail(error.what(), 2);
    throw;
  } catch (const std::bad_alloc&) {
    watch.fail(kNotEnoughMemory);
    throw;
  } catch (const std::exception& error) {
    watch.fail(error.what());
    throw;
  }
}

/// The options, or what is wrong with them: several ranks find the same, and one line is enough.
Options read_options(const std::vector<std::string>& arguments) {
  const ProcessLaunch launch = find_launch();
  try {
    Options options = parse_options(arguments);
    if (launch.size > 1 && options.command != Command::train && options.command != Command::none)
      throw UsageError(fmt::format("only train runs as several processes, {}={}, start one",
                                   launch.size_variable(), launch.size));
    return options;
  } catch (const UsageError& error) {
    if (launch.size == 1) throw;
    const std::string what = error.what();
    as_rank(WatchOptions().patience,
            [&](World&, Watch&, const InterruptGuard&) -> int { throw UsageError(what); });
    throw;
  }
}

int run_command(const Options& options) {
  switch (options.command) {
    case Command::none:
      return 0;
    case Command::prepare:
      return run_prepare(options.prepare);
    case Command::train:
      return as_rank(options.train.patience,
                     [&](World& world, Watch& watch, const InterruptGuard& interrupt) {
                       return train(options.train, world, watch, interrupt);
                     });
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
    return run_command(read_options({argv + 1, argv + argc}));
  } catch (const UsageError& error) {
    return fail(error.what(), 2);
  } catch (const std::bad_alloc&) {
    return fail(kNotEnoughMemory, 1);
  } catch (const std::exception& error) {
    return fail(error.what(), 1);
  }
}
