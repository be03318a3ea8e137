// The command line: every option of every command, its default and its check, in one place.
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "data/prepare.h"
#include "model/parameters.h"

/// Where to compute, and how.
struct MachineOptions {
  std::string device = "auto";  // auto (a GPU when there is one) | cpu | cuda
  std::string dtype = "auto";   // auto (bf16 on a GPU, fp32 on the CPU) | fp32 | bf16
  int threads = 0;              // 0: all cores
};

struct TrainOptions {
  MachineOptions machine;
  std::string train, val, out;      // shard globs; output folder
  std::string model = "gpt2-mini";  // preset[:key=value,...]
  std::string init;                 // checkpoint folder or .safetensors to start from
  bool resume = false;
  int64_t batch_size = 8;    // rows of one micro-batch
  int64_t seq_len = 256;     // tokens of one row
  int64_t grad_accum = 1;    // micro-batches per step, on each rank
  int64_t global_batch = 0;  // rows of one update over all ranks; 0: what the two above give
  int ranks = 1;             // processes of the job: share_batch() in setup.h. An option of `info` alone
  int64_t steps = 1000;
  uint64_t seed = 1337;
  bool shuffle = false;          // read the T-token chunks of the data in a seeded random order
  int64_t val_every = 100;       // steps; 0: only before the first and after the last
  int64_t val_tokens = 1 << 20;  // at most this many; the validation data may hold fewer
  int64_t sample_every = 0;      // steps; 0: never
  int64_t sample_tokens = 256;
  int64_t norms_every = 0;       // steps; 0: never. Telemetry in the paper's quantities
  int64_t checkpoint_every = 0;  // steps; 0: only after the last
  int64_t verify_every = 500;    // steps between comparisons of the ranks' parameters; 0: at checkpoints only
  double patience = 60;          // seconds that a rank may be waited for before it counts as hung
  int64_t keep = 2;              // newest checkpoints to keep; 0: all
  std::string qk_clip;           // TAU[:alpha=A], a bound on attention logits; empty: off
  std::string recipe = "muon";
  std::map<Role, std::string> rules;       // what the user set; the recipe fills in the rest
  std::vector<std::string> overrides;      // PATTERN=RULE, for tensors by name
  std::vector<std::string> sensitivities;  // PATTERN=VALUE or masses:...
  std::string schedule;                    // NAME[:key=value,...]; empty: the recipe's
  double grad_clip = -1;                   // global gradient norm; 0: off; negative: the recipe's
  double sharpness = 0;  // > 0: step sizes from dual norms (Proposition 7) instead of a schedule
  std::string escape;    // not empty: the escape velocity, ETA0[:growth=..,coefficient=..]

  int64_t rows_per_rank() const { return batch_size * grad_accum; }
  int64_t rows() const { return rows_per_rank() * ranks; }  // of the global batch
  int64_t tokens_per_step() const { return rows() * seq_len; }
};

struct GenerateOptions {
  MachineOptions machine;
  std::string model, prompt;
  int64_t tokens = 256;
  double temperature = 0.8;
  int64_t top_k = 0;  // 0: all
  uint64_t seed = 1337;
};

struct EvaluateOptions {
  MachineOptions machine;
  std::string model, data;
  int64_t batch_size = 8;
  int64_t seq_len = 0;  // 0: as many positions as the model has
  int64_t tokens = 0;   // 0: all
  std::string logits;   // file for logits of the first row, JSON; empty: none
};

struct PolarOptions {
  std::string ns;       // a set of polynomials or coefficients; empty: all sets
  int steps = 0;        // 0: each set's own number
  double least = 1e-3;  // smallest singular value of X / ||X||_F that counts
  double within = 0;    // > 0: look for the fewest steps that bring all of them this close to 1
  std::string plot;     // file for columns x, value, value, ...; empty: none
};

enum class Command : uint8_t { none, prepare, train, generate, evaluate, info, polar };

struct Options {
  Command command = Command::none;  // none: help was printed
  PrepareOptions prepare;
  TrainOptions train;  // also of `info`
  GenerateOptions generate;
  EvaluateOptions evaluate;
  PolarOptions polar;
};

/// Reads the command line; `--config FILE` stands for the options in the file, and the command line wins over
/// it. Throws UsageError. `--help` prints to standard output and returns Command::none.
Options parse_options(std::vector<std::string> arguments);

/// What decides the numbers of a run; logged, kept in checkpoints and compared on resume.
nlohmann::json to_json(const TrainOptions& options);
