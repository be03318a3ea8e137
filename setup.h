// From options to the parts of a run: what `train` and `info` share, and what a resumed run must agree on.
#pragma once

#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "data/tokenizer.h"
#include "model/config.h"
#include "model/kernels/context.h"
#include "optim/optimizer.h"
#include "optim/qk_clip.h"
#include "options.h"
#include "world/watch.h"
#include "world/world.h"

/// Where weights are, from what the user gave: a checkpoint folder, a .safetensors file, or the newest
/// checkpoint of a run's folder. RunError when there is nothing.
std::string find_weights(const std::string& path);

/// Makes `ctx` the device that the options ask for, this rank's share of it: a GPU of its own as long as
/// there are enough, its part of the cores. Then joins the other ranks; `poll` is that of World::join.
/// UsageError when this binary or machine cannot.
void use_device(Context& ctx, const MachineOptions& options, World& world, std::function<void()> poll = {});
/// For commands that run as a single process.
void use_device(Context& ctx, const MachineOptions& options);
/// "cpu, 2 threads, fp32" or "NVIDIA H200, bf16".
std::string describe_device(const Context& ctx);
/// Bytes that a plan may use where `ctx` computes: the free memory of a GPU, all of the machine's on the CPU.
int64_t usable_memory(const Context& ctx);

/// The same options as each of `ranks` processes takes them: how many micro-batches of how many rows.
/// UsageError when --global-batch cannot be shared out evenly.
TrainOptions share_batch(TrainOptions options, int ranks);

/// The model to train: --model, or the sizes in the config.json of --init; the vocabulary comes from the
/// tokenizer beside the shards, GPT-2's 50257 when there is none. UsageError when --seq-len does not fit.
ModelConfig choose_model(const TrainOptions& options, const Tokenizer* tokenizer);

/// The recipe, overridden by what the user set. UsageError for a role that the model does not have.
OptimizerOptions choose_optimizer(const TrainOptions& options, const ParameterTable& parameters);

/// What --qk-clip asks for.
QkClipOptions choose_qk_clip(const TrainOptions& options);

/// What state.json of a checkpoint says about the run that wrote it.
struct RunState {
  int64_t step = 0;
  double val_loss = 0;  // of the last validation; NaN when there was none
  double train_seconds = 0;
};

/// The part of the options that decides the numbers, fully resolved: compared field by field on resume.
nlohmann::json run_identity(const TrainOptions& options, const ModelConfig& config,
                            const OptimizerOptions& optimizer, uint64_t data_fingerprint);
/// state.json.
nlohmann::json state_to_json(const RunState& state, const TrainOptions& options,
                             const nlohmann::json& identity);
/// Reads it back; RunError naming file and field when it is damaged, or when the run is another one than
/// `identity`.
RunState state_from_json(const nlohmann::json& json, const nlohmann::json& identity,
                         const std::string& folder);

/// What all ranks of a job must have in common before they read anything: options and the program; and then
/// the model and the data. Names and values for Watch::agree().
Watch::Facts job_facts(const TrainOptions& options);
Watch::Facts data_facts(const nlohmann::json& identity, uint64_t val_fingerprint);

/// The newest checkpoint of --out when resuming, the same on all ranks. UsageError when --out holds a run and
/// --resume was not given; damaged checkpoints are passed over with a warning on standard error.
std::optional<std::string> checkpoint_to_resume(const TrainOptions& options, Comm& comm);
