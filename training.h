// A run between its first step and its last: what `train` does with its parts, on every rank alike. Rank 0
// alone logs, shows progress, samples and writes what a checkpoint has once.
//
// A GPU works a step behind: while it makes one, the next is enqueued, so numbers of a step are read, logged
// and judged when they come.
#pragma once

#include <cmath>
#include <deque>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>

#include "data/loader.h"
#include "data/tokenizer.h"
#include "model/flops.h"
#include "model/gpt.h"
#include "model/kernels/readback.h"
#include "optim/exchange.h"
#include "optim/optimizer.h"
#include "optim/qk_clip.h"
#include "optim/telemetry.h"
#include "options.h"
#include "run_log.h"
#include "setup.h"
#include "world/watch.h"

struct Training {
  const TrainOptions& options;
  const Tokenizer* tokenizer;     // null for shards that came without one
  const nlohmann::json identity;  // what a resumed run must agree on
  const MachineRates rates;       // of this machine, measured at the start
  Gpt& model;
  Optimizer& optimizer;
  Exchange& exchange;
  Telemetry& telemetry;
  QkClip* const qk_clip;   // null without --qk-clip
  BatchReader& batches;    // this rank's rows of every global batch
  const Loader& val_data;  // one row at a time
  RunLog& log;
  Progress& progress;
  Watch& watch;    // over the other ranks
  RunState state;  // of the steps whose numbers have come

  Comm& comm = *model.context().comm;
  StepGraph graph{model.context(), comm.alone() && optimizer.capturable()};
  Readback losses{model.context(), 1};
  struct Enqueued {
    int64_t step, loss, report, clip;  // tickets of what it will say
    double start;
  };
  std::deque<Enqueued> enqueued = {};
  double last_end = 0;                  // when the last step's numbers came
  CommCosts last_costs = {};            // until then
  std::optional<StepNorms> norms = {};  // of the last measured step

  int64_t next_step() const { return state.step + static_cast<int64_t>(enqueued.size()); }
  bool due(int64_t every) const { return every > 0 && next_step() % every == 0; }
  /// One update: gradients of grad_accum micro-batches, then the optimizer.
  void enqueue_step();
  /// Waits for the steps that were enqueued, all but the newest `leave`, and logs them.
  void finish_steps(size_t leave);
  /// The mean loss over the first --val-tokens of the validation data, in whole rows, shared by the ranks.
  void validate();
  /// Ends the job when the weights that the model reads are not the same bits on all ranks.
  void verify();
  /// Text from the model as it is now, begun by an end-of-text token: the start of a document.
  void sample();
  void checkpoint();

 private:
  void finish(const Enqueued& step);
  void add_costs(nlohmann::ordered_json& line, double seconds);
  void name_slow_rank();
  void gradients(const std::vector<TokenBatch>& micro);
  void update(int64_t step, bool keep_directions);
  void measure(int64_t step, const std::vector<TokenBatch>& micro);
};
