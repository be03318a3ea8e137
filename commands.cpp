#include "commands.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "data/tokenizer.h"
#include "files.h"
#include "json_text.h"
#include "model/checkpoint.h"
#include "model/generate.h"
#include "plan.h"
#include "run_log.h"
#include "setup.h"

#ifndef GIT_REVISION
#define GIT_REVISION "unknown"
#endif

namespace {
/// A model ready to run forward, with its tokenizer (null when its folder has none).
struct LoadedModel {
  Context ctx;
  std::string folder;
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<Gpt> model;

  LoadedModel(const std::string& path, const MachineOptions& machine) : folder(find_weights(path)) {
    use_device(ctx, machine);
    if (std::filesystem::exists(folder + "/tokenizer.json")) tokenizer = load_tokenizer(folder);
  }
  void load(const ModelConfig& config, int64_t max_tokens) {
    model = std::make_unique<Gpt>(ctx, config, max_tokens, /*training=*/false);
    model->allocate();
    load_parameters(folder, model->parameters());
  }
};

/// Rows longer than those it was trained on would use positions that never learned anything.
int64_t trained_context(const std::string& folder, const ModelConfig& config) {
  if (!std::filesystem::exists(folder + "/state.json")) return config.positions;
  const nlohmann::json state = load_state(folder);
  const auto identity = state.find("identity");
  if (identity == state.end() || !identity->is_object() || !identity->contains("seq_len") ||
      !(*identity)["seq_len"].is_number_integer())
    return config.positions;
  return std::clamp<int64_t>((*identity)["seq_len"].get<int64_t>(), 1, config.positions);
}

/// One row of tokens, the logits after its last token, and the mean loss of predicting each token but the
/// first from those before it: for comparison with other programs.
void write_logits(const std::string& path, Gpt& model, std::vector<int32_t> row) {
  const auto T = static_cast<int64_t>(row.size());
  std::vector<int32_t> targets(row.begin() + 1, row.end());
  targets.push_back(0);  // of the last position; its loss is left out below
  const Tensor tokens(row.data(), {1, T});
  model.forward(tokens, Tensor(targets.data(), {1, T}));
  double loss = 0;
  const OnHost losses(model.context(), model.token_losses().slice(0, T - 1));
  for (const float token_loss : losses->floats()) loss += token_loss / static_cast<double>(T - 1);
  std::vector<float> logits(static_cast<size_t>(model.config().padded_V()));
  model.next_token_logits(tokens, Tensor(logits.data(), {1, model.config().padded_V()}));
  logits.resize(static_cast<size_t>(model.config().V));
  const nlohmann::json json = {{"tokens", {row}}, {"logits", {logits}}, {"loss", loss}};
  write_text(path, json_text(json) + "\n", Existing::replace);
}

/// Where step sizes come from.
void print_steps(const OptimizerOptions& rules) {
  std::string source = "each rule's lr";
  if (rules.sharpness > 0)
    source = fmt::format("one eta for all: dual norms / {:g} (Proposition 7)", rules.sharpness);
  if (rules.escape)
    source = fmt::format("one eta for all: the escape velocity, from {:g} on", rules.escape->first);
  fmt::print("steps      {}, times the schedule {}\n", source, rules.schedule.str());
}

/// How every tensor is updated; among several ranks also by which, and what falls to each. `one_eta`: in the
/// place of the rules' lr.
void print_rules(const Optimizer& optimizer, const ParameterTable& parameters, int ranks, bool one_eta) {
  fmt::print("\n{:<28} {:<10} {:>14}  {:<29} {:>9} {:>7} {:>6}  {}{}\n", "tensor", "role", "shape", "norm",
             "lr", "decay", "s", ranks > 1 ? fmt::format("{:<14}", "ranks") : "", "rule");
  for (const RowInfo& row : optimizer.describe(ranks)) {
    const Parameter& p = parameters.at(row.parameter);
    const std::string shape =
        row.matrices > 1
            ? fmt::format("{} x {}", row.matrices, Shape{p.shape[0] / row.matrices, p.shape[1]}.str())
            : p.shape.str();
    const std::string by = row.by == role_name(row.role) ? "" : fmt::format("  (--set {})", row.by);
    const std::string owners = ranks > 1 ? fmt::format("{:<14}", row.owners) : "";
    const std::string lr = one_eta ? "eta" : fmt::format("{:g}", row.lr);
    fmt::print("{:<28} {:<10} {:>14}  {:<29} {:>9} {:>7g} {:>6.4g}  {}{}{}\n", row.parameter,
               role_name(row.role), shape, row.norm, lr, row.weight_decay, row.sensitivity, owners, row.rule,
               by);
  }
  if (ranks > 1) fmt::print("\n{}", optimizer.describe_ranks(ranks));
}
}  // namespace

int run_prepare(const PrepareOptions& options) {
  if (is_prepared(options)) {
    fmt::print("{} is up to date\n", options.out);
    return 0;
  }
  Progress progress(0, 0);
  const PrepareReport report = prepare(options, [&](double fraction, double mb_per_second) {
    progress.show(fmt::format("preparing  {:3.0f} %  {:.0f} MB/s", 100 * fraction, mb_per_second));
  });
  progress.finish();
  fmt::print("{} documents: {} training tokens in {} shard{}, {} validation tokens in {}; vocabulary of {}\n",
             report.documents, report.train_tokens, report.train_shards, report.train_shards == 1 ? "" : "s",
             report.val_tokens, report.val_shards, report.vocab_size);
  return 0;
}

int run_generate(const GenerateOptions& options) {
  LoadedModel loaded(options.model, options.machine);
  if (!loaded.tokenizer)
    throw RunError(
        fmt::format("no tokenizer.json there, {}, copy the one of the model's data", loaded.folder));
  const ModelConfig config = load_config(loaded.folder);
  const int64_t context = trained_context(loaded.folder, config);
  loaded.load(config, context);
  const int32_t end = loaded.tokenizer->end_of_text();
  std::vector<int32_t> tokens = {end};  // a document begins
  for (const int32_t id : loaded.tokenizer->encode(options.prompt)) tokens.push_back(id);
  fmt::print("{}", options.prompt);
  generate(*loaded.model, tokens,
           {.tokens = options.tokens,
            .temperature = options.temperature,
            .top_k = options.top_k,
            .seed = options.seed,
            .end_of_text = end,
            .context = context},
           [&](int32_t id) {
             fmt::print("{}", loaded.tokenizer->decode(id));
             std::fflush(stdout);
           });
  fmt::print("\n");
  return 0;
}

int run_evaluate(const EvaluateOptions& options) {
  LoadedModel loaded(options.model, options.machine);
  const ModelConfig config = load_config(loaded.folder);
  const int64_t T = options.seq_len > 0 ? options.seq_len : trained_context(loaded.folder, config);
  if (T > config.positions)
    throw UsageError(
        fmt::format("the model has {} positions, --seq-len {}, use at most that", config.positions, T));
  loaded.load(config, options.batch_size * T);
  const Shards shards(options.data, config.V);
  const Loader loader(shards, {.rows = 1, .T = T});
  const int64_t rows =
      options.tokens > 0 ? std::clamp<int64_t>(options.tokens / T, 1, loader.chunks()) : loader.chunks();
  const double loss = mean_loss(*loaded.model, loader, rows, options.batch_size);
  fmt::print("loss {:.6f} nats per token, perplexity {:.4f}, {} tokens in rows of {}\n", loss, std::exp(loss),
             rows * T, T);
  if (!options.logits.empty()) {
    std::vector<int32_t> inputs(static_cast<size_t>(T)), targets(inputs.size());
    loader.fill_chunks(0, 1, inputs.data(), targets.data());
    write_logits(options.logits, *loaded.model, inputs);
  }
  return 0;
}

double mean_loss(Gpt& model, const Loader& data, int64_t rows, int64_t batch_size) {
  const int64_t T = data.options().T;
  std::vector<int32_t> inputs(static_cast<size_t>(batch_size * T)), targets(inputs.size());
  Comm& comm = *model.context().comm;
  double sum = 0;
  for (int64_t row = comm.rank() * batch_size; row < rows; row += comm.size() * batch_size) {
    const int64_t count = std::min(batch_size, rows - row);
    data.fill_chunks(row, count, inputs.data(), targets.data());
    sum += static_cast<double>(count) *
           model.forward(Tensor(inputs.data(), {count, T}), Tensor(targets.data(), {count, T}));
  }
  comm.sum({&sum, 1});
  return sum / static_cast<double>(rows);
}

int run_info(const TrainOptions& given) {
  const TrainOptions options = share_batch(given, given.ranks);
  Context ctx;
  use_device(ctx, options.machine);
  const std::unique_ptr<Tokenizer> tokenizer =
      options.train.empty() ? nullptr : find_tokenizer(options.train);
  Gpt model(ctx, choose_model(options, tokenizer.get()), options.batch_size * options.seq_len,
            /*training=*/true, /*micro_batches=*/1,
            /*watch_logits=*/choose_qk_clip(options).on());
  const OptimizerOptions rules = choose_optimizer(options, model.parameters());
  const Optimizer optimizer(ctx, model.parameters(), rules);
  print_plan(options, model, optimizer, Telemetry(ctx, model.parameters(), optimizer, options.norms_every));
  print_steps(rules);
  print_rules(optimizer, model.parameters(), options.ranks, rules.measured());
  return 0;
}

nlohmann::ordered_json run_line(const TrainOptions& options, const Gpt& model, const OptimizerOptions& rules,
                                const MachineRates& rates) {
  const ModelConfig& config = model.config();
  nlohmann::json resolved = nlohmann::json::object();
  for (const auto& [role, rule] : rules.rules) resolved[role_name(role)] = rule;
  return {{"type", "run"},
          {"options", to_json(options)},
          {"model",
           {{"layers", config.L},
            {"heads", config.NH},
            {"channels", config.C},
            {"positions", config.positions},
            {"vocab_size", config.V}}},
          {"rules", resolved},
          {"schedule", rules.schedule.str()},
          {"grad_clip", rules.grad_clip},
          {"seed", options.seed},
          {"device", describe_device(model.context())},
          {"peak_flops", rates.flops},
          {"copy_bytes_per_second", rates.memory.bytes},
          {"revision", GIT_REVISION},
          {"parameters", model.parameters().size()}};
}

std::string resume_advice(const std::string& out) {
  const auto newest = newest_checkpoint(out);
  if (!newest) return "there is no checkpoint yet: start again with a smaller step size";
  return fmt::format("the last checkpoint is intact ({}): start from it with --init and a smaller step size",
                     *newest);
}

RunError not_finite(const ParameterTable& parameters, int64_t step, const std::string& out) {
  const auto finite = [&](const Tensor& t) {
    const OnHost host(parameters.context(), t);
    return std::ranges::all_of(host->floats(), [](float x) { return std::isfinite(x); });
  };
  std::string first = "all weights and gradients are finite";
  for (const Parameter& p : parameters) {
    const bool weight_ok =
        std::ranges::all_of(p.masters, [&](const MasterRows& m) { return finite(m.values); });
    if (weight_ok && finite(p.grad)) continue;
    first = fmt::format("first in the {} {}", weight_ok ? "gradient of" : "weight", p.name);
    break;
  }
  return RunError(fmt::format("the loss is not finite, step {} ({}), {}", step, first, resume_advice(out)));
}

std::string valid_utf8(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const auto lead = static_cast<unsigned char>(text[i]);
    const size_t length = lead < 0x80                   ? 1
                          : lead >= 0xC2 && lead < 0xE0 ? 2
                          : lead >= 0xE0 && lead < 0xF0 ? 3
                          : lead >= 0xF0 && lead < 0xF5 ? 4
                                                        : 0;
    bool ok = length > 0 && i + length <= text.size();
    for (size_t k = 1; ok && k < length; ++k) ok = (static_cast<unsigned char>(text[i + k]) & 0xC0) == 0x80;
    // Overlong forms, surrogates and values past U+10FFFF differ in the second byte only.
    if (ok && length >= 3) {
      const auto second = static_cast<unsigned char>(text[i + 1]);
      ok = !(lead == 0xE0 && second < 0xA0) && !(lead == 0xED && second > 0x9F) &&
           !(lead == 0xF0 && second < 0x90) && !(lead == 0xF4 && second > 0x8F);
    }
    out += ok ? text.substr(i, length) : "\xEF\xBF\xBD";
    i += ok ? length : 1;
  }
  return out;
}
