#include "options.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <fstream>
#include <nlohmann/json.hpp>

#include "error.h"
#include "optim/recipe.h"
#include "optim/rule.h"

namespace {
constexpr int64_t kMany = int64_t{1} << 40;  // no count of anything here is larger
constexpr double kLarge = 1e30;

/// Accepts integers in [low, high], and says so when it gets something else.
CLI::Validator integer(int64_t low, int64_t high = kMany) {
  const std::string legal =
      high == kMany ? fmt::format("an integer >= {}", low) : fmt::format("an integer in [{}, {}]", low, high);
  return {[=](const std::string& text) {
            int64_t value = 0;
            const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
            const bool ok =
                error == std::errc() && end == text.data() + text.size() && value >= low && value <= high;
            return ok ? "" : fmt::format("'{}' is not {}", text, legal);
          },
          ""};
}

/// The same for numbers.
CLI::Validator number(double low, double high = kLarge) {
  const std::string legal = high == kLarge ? fmt::format("a number >= {:g}", low)
                                           : fmt::format("a number in [{:g}, {:g}]", low, high);
  return {[=](const std::string& text) {
            double value = 0;
            const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
            const bool ok =
                error == std::errc() && end == text.data() + text.size() && value >= low && value <= high;
            return ok ? "" : fmt::format("'{}' is not {}", text, legal);
          },
          ""};
}

void add_prepare(CLI::App& app, PrepareOptions& o) {
  app.add_option("--text", o.texts, "text files; documents end with a line <|endoftext|>")->required();
  app.add_option("--out", o.out, "folder for train_*.bin, val_*.bin and tokenizer.json")->required();
  app.add_option("--tokenizer", o.tokenizer, "byte (256 bytes and an end-of-text id)");
  app.add_option("--val-fraction", o.val_fraction, "share of the bytes kept for validation")
      ->check(number(0, 0.9));
  app.add_option("--shard-tokens", o.shard_tokens, "tokens of one file")->check(integer(1));
  app.add_option("--threads", o.threads, "0: all cores")->check(integer(0, 1024));
}

void add_run(CLI::App& app, TrainOptions& o, bool train) {
  app.add_option("--train", o.train, "token shards to train on, a glob in quotes")->required(train);
  app.add_option("--val", o.val, "token shards to validate on")->required(train);
  app.add_option("--out", o.out, "folder of this run: log.jsonl, checkpoints/")->required(train);
  app.add_option(
      "--model", o.model,
      fmt::format(
          "{}; sizes by hand: NAME:layers=L,heads=NH,channels=C,positions=T; tied=0: a head of its own",
          fmt::join(model_names(), ", ")));
  app.add_option("--init", o.init, "start from a checkpoint folder or a GPT-2 model.safetensors");
  app.add_flag("--resume", o.resume, "continue from the newest checkpoint in --out, if there is one");
}

void add_machine(CLI::App& app, MachineOptions& o) {
  app.add_option("--device", o.device, "auto (a GPU when there is one), cpu, cuda")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}));
  app.add_option("--dtype", o.dtype, "of activations: auto (bf16 on a GPU, else fp32), fp32, bf16")
      ->check(CLI::IsMember({"auto", "fp32", "bf16"}));
  app.add_option("--threads", o.threads, "of the CPU; 0: all cores")->check(integer(0, 1024));
}

void add_batch(CLI::App& app, TrainOptions& o) {
  app.add_option("--batch-size", o.batch_size, "rows of a micro-batch")->check(integer(1));
  app.add_option("--seq-len", o.seq_len, "tokens of a row")->check(integer(1));
  app.add_option("--grad-accum", o.grad_accum, "micro-batches of a step on each rank")->check(integer(1));
  app.add_option("--global-batch", o.global_batch,
                 "rows of an update over all ranks and micro-batches, instead of --grad-accum; 0: off")
      ->check(integer(0));
  app.add_option("--steps", o.steps, "updates in all; 0 validates only")->check(integer(0));
  app.add_option("--seed", o.seed, "of initialisation, shuffling and samples")->check(integer(0));
  app.add_flag("--shuffle", o.shuffle, "read the data's rows in a seeded random order");
}

void add_reports(CLI::App& app, TrainOptions& o) {
  app.add_option("--val-every", o.val_every, "steps; 0: first and last only")->check(integer(0));
  app.add_option("--val-tokens", o.val_tokens, "validate on at most this many tokens")->check(integer(1));
  app.add_option("--sample-every", o.sample_every, "steps; 0: never")->check(integer(0));
  app.add_option("--sample-tokens", o.sample_tokens, "tokens of a sample")->check(integer(1));
  app.add_option("--norms-every", o.norms_every,
                 "steps between measurements of norms, alignment and sharpness per tensor; 0: never")
      ->check(integer(0));
  app.add_option("--checkpoint-every", o.checkpoint_every, "steps; 0: only after the last")
      ->check(integer(0));
  app.add_option("--verify-every", o.verify_every,
                 "steps between comparisons of the parameters of all ranks; 0: at checkpoints only")
      ->check(integer(0));
  app.add_option("--patience", o.patience, "seconds that ranks wait for one of them before they give up")
      ->check(number(0.1, 1e6));
  app.add_option("--keep", o.keep, "newest checkpoints to keep; 0: all")->check(integer(0));
}

void add_optimizer(CLI::App& app, TrainOptions& o) {
  app.add_option("--recipe", o.recipe, "rules and schedule by name, see below");
  for (const Role role : kRoles)
    app.add_option(std::string("--") + role_name(role), o.rules[role],
                   fmt::format("rule for {} tensors, RULE[:key=value,...]", role_name(role)));
  app.add_option(
         "--set", o.overrides,
         "PATTERN=RULE for tensors by name, before their role's: 'h.*.mlp.c_proj=muon:lr=0.04'; repeatable")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->expected(1);
  app.add_option(
         "--sensitivity", o.sensitivities,
         "s of Proposition 7: PATTERN=VALUE, or masses[:embedding=M,hidden=M,...,residual=R]; repeatable")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->expected(1);
  app.add_option("--schedule", o.schedule,
                 "constant, linear, cosine, wsd, with keys warmup, cooldown, final");
  app.add_option("--grad-clip", o.grad_clip, "largest global gradient norm; 0: off")->check(number(0));
  app.add_option("--qk-clip", o.qk_clip,
                 "TAU[:alpha=0.5]: shrink q and k of heads with logits above TAU (MuonClip)");
  app.add_option("--sharpness", o.sharpness,
                 "> 0: step sizes from dual norms (Proposition 7), 0: from the schedule")
      ->check(number(0));
  app.add_option(
      "--escape", o.escape,
      "step sizes grow from ETA0[:growth=G,coefficient=C] to the escape velocity (Prodigy, any norm)");
}

void add_generate(CLI::App& app, GenerateOptions& o) {
  app.add_option("--model", o.model, "checkpoint folder, or the --out of a run")->required();
  app.add_option("--prompt", o.prompt, "text to continue");
  app.add_option("--tokens", o.tokens, "how many to generate")->check(integer(0));
  app.add_option("--temperature", o.temperature, "0: the likeliest token always")->check(number(0, 100));
  app.add_option("--top-k", o.top_k, "draw among the k likeliest; 0: all")->check(integer(0));
  app.add_option("--seed", o.seed, "of the draw")->check(integer(0));
  add_machine(app, o.machine);
}

void add_evaluate(CLI::App& app, EvaluateOptions& o) {
  app.add_option("--model", o.model, "checkpoint folder, or the --out of a run")->required();
  app.add_option("--data", o.data, "token shards, a glob in quotes")->required();
  app.add_option("--batch-size", o.batch_size, "rows at a time")->check(integer(1));
  app.add_option("--seq-len", o.seq_len, "tokens of a row; 0: the model's positions")->check(integer(0));
  app.add_option("--tokens", o.tokens, "at most this many; 0: all")->check(integer(0));
  app.add_option("--logits", o.logits, "write tokens, last logits and loss of the first row as JSON");
  add_machine(app, o.machine);
}

void add_polar(CLI::App& app, PolarOptions& o) {
  app.add_option("--ns", o.ns,
                 "a set by name, or coefficients: 8x3.4445:-4.775:2.0315+2x2:-1.5:0.5; empty: all");
  app.add_option("--steps", o.steps, "0: each set's own number; more repeat the last step")
      ->check(integer(0, 100));
  app.add_option("--least", o.least, "smallest singular value of X / ||X||_F that counts")
      ->check(number(1e-12, 1));
  app.add_option("--within", o.within, "> 0: the fewest steps that end in [1 - WITHIN, 1 + WITHIN]")
      ->check(number(0, 0.5));
  app.add_option("--plot", o.plot, "write columns x, value, value, ... for gnuplot");
}

std::string trim(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t\r");
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(" \t\r") - first + 1);
}

/// `key = value` lines as command-line words; a bare `key` is a flag; # begins a comment line.
std::vector<std::string> read_config(const std::string& path) {
  std::ifstream file(path);
  if (!file)
    throw UsageError(fmt::format("cannot read the options, --config {}, name a readable file", path));
  std::vector<std::string> words;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    line = trim(line);
    if (line.empty() || line[0] == '#') continue;
    const size_t equals = line.find('=');
    const std::string key = trim(line.substr(0, equals));
    if (key.empty() || key.find_first_of(" \t-") == 0 || key == "config")
      throw UsageError(
          fmt::format("line {} is not 'option = value', --config {}, write one option per line, "
                      "without the dashes",
                      number, path));
    words.push_back("--" + key);
    if (equals == std::string::npos) continue;
    std::string value = trim(line.substr(equals + 1));
    if (value.size() >= 2 && value.front() == '"' && value.back() == '"')
      value = value.substr(1, value.size() - 2);
    words.push_back(value);
  }
  return words;
}

/// Replaces `--config FILE` by the options of the file, put first so that the command line wins.
std::vector<std::string> expand_config(const std::vector<std::string>& arguments) {
  std::vector<std::string> from_file, rest;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i] == "--config") {
      if (i + 1 == arguments.size()) throw UsageError("no file given, --config, write --config FILE");
      from_file = read_config(arguments[++i]);
    } else if (arguments[i].starts_with("--config=")) {
      from_file = read_config(arguments[i].substr(9));
    } else {
      rest.push_back(arguments[i]);
    }
  }
  if (!from_file.empty() && !rest.empty()) rest.insert(rest.begin() + 1, from_file.begin(), from_file.end());
  return rest;
}

/// The rules and recipes there are, from their own tables.
std::string rules_and_recipes() {
  std::string text = "Rules:\n";
  for (const RuleEntry& rule : rule_table()) text += fmt::format("  {:<10} {}\n", rule.name, rule.help);
  text += "Recipes:\n";
  for (const Recipe& recipe : recipe_table()) text += fmt::format("  {:<10} {}\n", recipe.name, recipe.help);
  return text + "A rule lists its keys when it gets an unknown one: --hidden muon:keys=1";
}
}  // namespace

Options parse_options(std::vector<std::string> arguments) {
  Options options;
  CLI::App app(
      "Trains GPT models from scratch; every tensor moves by steepest descent under a norm that fits its "
      "role.",
      "train_gpt");
  app.require_subcommand(1);
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  app.option_defaults()->always_capture_default();
  CLI::App* prepare = app.add_subcommand("prepare", "text files to token shards");
  CLI::App* train = app.add_subcommand("train", "train a model");
  CLI::App* generate = app.add_subcommand("generate", "continue a prompt");
  CLI::App* evaluate = app.add_subcommand("evaluate", "loss of a model on token shards");
  CLI::App* info =
      app.add_subcommand("info", "what `train` with these options would do: memory, parameters, rules");
  CLI::App* polar =
      app.add_subcommand("polar", "how close to 1 the polynomials of Newton-Schulz bring singular values");
  add_prepare(*prepare, options.prepare);
  for (CLI::App* command : {train, info}) {
    add_run(*command, options.train, command == train);
    add_batch(*command, options.train);
    add_optimizer(*command, options.train);
    add_reports(*command, options.train);
    add_machine(*command, options.train.machine);
    command->footer(rules_and_recipes());
  }
  info->add_option("--ranks", options.train.ranks,
                   "show the job and who would own what among so many processes")
      ->check(integer(1, 1 << 16));
  add_generate(*generate, options.generate);
  add_evaluate(*evaluate, options.evaluate);
  add_polar(*polar, options.polar);
  std::string config_file;  // consumed by expand_config; declared for --help
  for (CLI::App* command : app.get_subcommands({}))
    command->add_option("--config", config_file, "read options from FILE, lines 'batch-size = 8'");
  prepare->get_option("--text")->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);

  arguments = expand_config(arguments);
  try {
    std::reverse(arguments.begin(), arguments.end());  // CLI11 reads its vector from the back
    app.parse(arguments);
  } catch (const CLI::CallForHelp&) {
    const auto chosen = app.get_subcommands();
    fmt::print("{}", chosen.empty() ? app.help() : chosen[0]->help());
    return options;
  } catch (const CLI::ParseError& error) {
    const auto chosen = app.get_subcommands();
    std::string what = error.what();
    std::replace(what.begin(), what.end(), '\n', ' ');
    if (chosen.empty()) what = "no such command, name one of prepare, train, generate, evaluate, info, polar";
    throw UsageError(fmt::format("{}, command line, see train_gpt {}--help", what,
                                 chosen.empty() ? "" : chosen[0]->get_name() + " "));
  }
  std::erase_if(options.train.rules, [](const auto& rule) { return rule.second.empty(); });
  options.command = prepare->parsed()    ? Command::prepare
                    : train->parsed()    ? Command::train
                    : generate->parsed() ? Command::generate
                    : evaluate->parsed() ? Command::evaluate
                    : polar->parsed()    ? Command::polar
                                         : Command::info;
  return options;
}

nlohmann::json to_json(const TrainOptions& o) {
  nlohmann::json rules = nlohmann::json::object();
  for (const auto& [role, rule] : o.rules) rules[role_name(role)] = rule;
  return {{"train", o.train},
          {"val", o.val},
          {"out", o.out},
          {"model", o.model},
          {"init", o.init},
          {"device", o.machine.device},
          {"dtype", o.machine.dtype},
          {"threads", o.machine.threads},
          {"batch_size", o.batch_size},
          {"seq_len", o.seq_len},
          {"grad_accum", o.grad_accum},
          {"ranks", o.ranks},
          {"steps", o.steps},
          {"seed", o.seed},
          {"shuffle", o.shuffle},
          {"val_every", o.val_every},
          {"val_tokens", o.val_tokens},
          {"qk_clip", o.qk_clip},
          {"recipe", o.recipe},
          {"rules", rules},
          {"set", o.overrides},
          {"sensitivity", o.sensitivities},
          {"schedule", o.schedule},
          {"grad_clip", o.grad_clip},
          {"sharpness", o.sharpness},
          {"escape", o.escape}};
}
