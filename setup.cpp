#include "setup.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "error.h"
#include "json_text.h"
#include "model/checkpoint.h"
#include "model/kernels/gemm.h"
#include "optim/recipe.h"
#include "run_log.h"

std::string find_weights(const std::string& path) {
  if (std::filesystem::is_regular_file(path) || (std::filesystem::exists(path) && has_config(path)))
    return path;
  if (const auto newest = newest_checkpoint(path)) return *newest;
  throw RunError(
      fmt::format("no model.safetensors with a config.json and no checkpoints there, {}, give a checkpoint "
                  "folder or the --out of a run",
                  path));
}

void use_device(Context& ctx, const MachineOptions& options) {
  World world{ProcessLaunch{}};
  use_device(ctx, options, world);
}

void use_device(Context& ctx, const MachineOptions& options, World& world, std::function<void()> poll) {
  if (options.device == "cuda" && !kHaveGpu)
    throw UsageError(
        "this program was built without CUDA, --device cuda, use --device cpu or build with `make CUDA=1`");
  bool gpu = options.device == "cuda";
  if constexpr (kHaveGpu) gpu = gpu || (options.device == "auto" && gpu::count() > 0);
  if (!gpu) {
    if (options.dtype == "bf16")
      throw UsageError("bf16 needs a GPU, --dtype bf16, use --dtype fp32 on the CPU");
    use_cpu(ctx, options.threads > 0 ? options.threads : world.threads());
    return world.join(ctx, std::move(poll));
  }
  int gpus = 0;
  if constexpr (kHaveGpu) gpus = gpu::count();
  use_gpu(ctx, gpus > 0 ? world.local_rank() % gpus : 0, options.dtype == "fp32" ? DType::f32 : DType::bf16);
  ctx.threads = use_threads(world.threads());  // for what stays on the host
  if constexpr (kHaveGpu)
    if (gpus > 0) gpu::set_gemm_options(ctx, {.cache_file = gpu::default_gemm_cache(ctx)});
  world.join(ctx, std::move(poll));
}

std::string describe_device(const Context& ctx) {
  if constexpr (kHaveGpu)
    if (ctx.device)
      return fmt::format("{}, {}", gpu::info(*ctx.device).name, ctx.dtype == DType::f32 ? "fp32" : "bf16");
  return fmt::format("cpu, {} thread{}, fp32", ctx.threads, ctx.threads == 1 ? "" : "s");
}

int64_t usable_memory(const Context& ctx) {
  if constexpr (kHaveGpu)
    if (ctx.device) return gpu::info(*ctx.device).free_bytes;
  return int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE);
}

TrainOptions share_batch(TrainOptions options, int ranks) {
  options.ranks = ranks;
  if (options.global_batch == 0) return options;
  if (options.grad_accum != 1)
    throw UsageError(
        fmt::format("--global-batch sets the number of micro-batches, --grad-accum {}, leave one out",
                    options.grad_accum));
  const int64_t rows = options.global_batch / ranks;
  options.batch_size = std::min(options.batch_size, std::max<int64_t>(rows, 1));
  options.grad_accum = rows / options.batch_size;
  if (options.rows() != options.global_batch)
    throw UsageError(fmt::format(
        "{} rows are no multiple of {} rank{} x {} rows of a micro-batch, --global-batch {}, choose one, or "
        "another --batch-size",
        options.global_batch, ranks, ranks == 1 ? "" : "s", options.batch_size, options.global_batch));
  return options;
}

ModelConfig choose_model(const TrainOptions& options, const Tokenizer* tokenizer) {
  constexpr int64_t kGpt2Vocabulary = 50257;
  const std::string weights = options.init.empty() ? "" : find_weights(options.init);
  ModelConfig config;
  if (weights.empty() ||
      !has_config(weights)) {  // a file without config.json beside it has the sizes of --model
    config = parse_model(options.model);
    config.V = tokenizer != nullptr ? tokenizer->vocab_size() : kGpt2Vocabulary;
  } else {
    config = load_config(weights);
    if (tokenizer != nullptr && tokenizer->vocab_size() != config.V)
      throw UsageError(
          fmt::format("its vocabulary of {} is not the data's {}, --init {}, prepare the data with the "
                      "model's tokenizer",
                      config.V, tokenizer->vocab_size(), options.init));
  }
  if (options.seq_len > config.positions)
    throw UsageError(
        fmt::format("{} tokens do not fit the model's {} positions, --seq-len {}, shorten it or use "
                    "--model NAME:positions={}",
                    options.seq_len, config.positions, options.seq_len, options.seq_len));
  validate(config);
  return config;
}

namespace {
RuleOverride parse_override(const std::string& text) {
  const size_t equals = text.find('=');
  if (equals == std::string::npos || equals == 0 || equals + 1 == text.size())
    throw UsageError(
        fmt::format("'{}' is not PATTERN=RULE, --set, write 'h.*.mlp.c_proj=muon:lr=0.04'", text));
  return {text.substr(0, equals), text.substr(equals + 1)};
}
}  // namespace

OptimizerOptions choose_optimizer(const TrainOptions& options, const ParameterTable& parameters) {
  std::set<Role> present;
  for (const Parameter& p : parameters) present.insert(p.role);
  OptimizerOptions chosen = recipe_options(options.recipe);
  for (const auto& [role, rule] : options.rules) {
    if (!present.contains(role))
      throw UsageError(fmt::format(
          "this model has no {} tensor{}, --{} {}, leave the option out", role_name(role),
          role == Role::head ? " of its own (it is tied to the embedding; --model NAME:tied=0 has one)" : "",
          role_name(role), rule));
    chosen.rules[role] = rule;
  }
  std::erase_if(chosen.rules, [&](const auto& rule) { return !present.contains(rule.first); });
  if (!options.schedule.empty()) chosen.schedule = parse_schedule("--schedule", options.schedule);
  if (options.grad_clip >= 0) chosen.grad_clip = options.grad_clip;
  chosen.sharpness = options.sharpness;
  for (const std::string& text : options.overrides) chosen.overrides.push_back(parse_override(text));
  chosen.sensitivities = options.sensitivities;
  if (!options.escape.empty()) chosen.escape = parse_escape("--escape", options.escape);
  return chosen;
}

QkClipOptions choose_qk_clip(const TrainOptions& options) {
  return parse_qk_clip("--qk-clip", options.qk_clip);
}

nlohmann::json run_identity(const TrainOptions& options, const ModelConfig& config,
                            const OptimizerOptions& optimizer, uint64_t data_fingerprint) {
  nlohmann::json rules = nlohmann::json::object();
  for (const auto& [role, rule] : optimizer.rules) rules[role_name(role)] = rule;
  nlohmann::json overrides = nlohmann::json::array();
  for (const RuleOverride& o : optimizer.overrides) overrides.push_back({o.pattern, o.rule});
  return {{"layers", config.L},
          {"heads", config.NH},
          {"channels", config.C},
          {"positions", config.positions},
          {"vocab_size", config.V},
          {"head_weight", config.tied ? "" : "its own"},
          {"seq_len", options.seq_len},
          {"rows", options.rows()},
          {"seed", options.seed},
          {"shuffle", options.shuffle},
          {"data_fingerprint", data_fingerprint},
          {"qk_clip", choose_qk_clip(options).str()},
          {"rules", rules},
          {"schedule", optimizer.schedule.str()},
          {"grad_clip", optimizer.grad_clip},
          {"sharpness", optimizer.sharpness},
          {"set", overrides},
          {"sensitivity", optimizer.sensitivities},
          {"escape", options.escape}};
}

nlohmann::json state_to_json(const RunState& state, const TrainOptions& options,
                             const nlohmann::json& identity) {
  return {{"step", state.step},
          {"tokens", state.step * options.tokens_per_step()},
          {"val_loss", state.val_loss},  // null when not a number
          {"train_seconds", state.train_seconds},
          {"identity", identity},
          {"options", to_json(options)}};
}

namespace {
/// How an option that is not used looks: nothing, "", [] or 0.
bool is_unused(const nlohmann::json& value) {
  return value.is_string() ? value.get_ref<const std::string&>().empty() : value.empty() || value == 0;
}
}  // namespace

RunState state_from_json(const nlohmann::json& json, const nlohmann::json& identity,
                         const std::string& folder) {
  const std::string file = folder + "/state.json";
  const auto damaged = [&](const char* field) {
    return RunError(
        fmt::format("field '{}' is missing or of the wrong type, {}, use another checkpoint", field, file));
  };
  if (!json.is_object() || !json.contains("step") || !json["step"].is_number_integer() || json["step"] < 0)
    throw damaged("step");
  if (!json.contains("train_seconds") || !json["train_seconds"].is_number()) throw damaged("train_seconds");
  if (!json.contains("val_loss") || !(json["val_loss"].is_number() || json["val_loss"].is_null()))
    throw damaged("val_loss");
  if (!json.contains("identity") || !json["identity"].is_object()) throw damaged("identity");
  for (const auto& [key, value] : identity.items()) {
    const nlohmann::json& saved = json["identity"].contains(key) ? json["identity"][key] : nlohmann::json();
    // An option that the program did not have when it wrote this, and that is not used now.
    if (saved.is_null() && is_unused(value)) continue;
    if (saved != value)
      throw RunError(
          fmt::format("{} is {} there and {} now, {}, resume with the options that began the run, or choose "
                      "another --out",
                      key, json_text(saved), json_text(value), file));
  }
  RunState state;
  state.step = json["step"];
  state.train_seconds = json["train_seconds"];
  state.val_loss = json["val_loss"].is_null() ? std::nan("") : json["val_loss"].get<double>();
  return state;
}

Watch::Facts job_facts(const TrainOptions& options) {
  Watch::Facts facts = {{"the program", program_fingerprint()}};
  const nlohmann::json all = to_json(options);
  for (const auto& [key, value] : all.items())
    if (key != "threads") facts.emplace_back(key, json_text(value));
  // What all ranks do together, and so must do at the same steps.
  for (const auto& [name, every] : {std::pair{"checkpoint_every", options.checkpoint_every},
                                    {"sample_every", options.sample_every},
                                    {"norms_every", options.norms_every},
                                    {"verify_every", options.verify_every},
                                    {"resume", int64_t{options.resume}}})
    facts.emplace_back(name, std::to_string(every));
  return facts;
}

Watch::Facts data_facts(const nlohmann::json& identity, uint64_t val_fingerprint) {
  Watch::Facts facts = {{"the validation data", fmt::format("{:016x}", val_fingerprint)}};
  for (const auto& [key, value] : identity.items()) facts.emplace_back(key, json_text(value));
  return facts;
}

std::optional<std::string> checkpoint_to_resume(const TrainOptions& options, Comm& comm) {
  std::vector<std::string> passed_over;
  auto newest = newest_checkpoint(comm, options.out, &passed_over);
  const bool holds_run = newest || RunLog::exists(options.out);
  comm.barrier();  // all have looked before rank 0 begins a log there
  if (!options.resume) {
    if (holds_run)
      throw UsageError(fmt::format("it already holds a run, --out {}, add --resume or choose another folder",
                                   options.out));
    return std::nullopt;
  }
  discard_unfinished(comm, options.out);
  for (const std::string& line : passed_over)
    fmt::print(stderr, "train_gpt: warning: passed over {}\n", line);
  return newest;
}
