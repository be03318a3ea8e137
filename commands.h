// The commands besides `train`, and what they share with it.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "data/loader.h"
#include "error.h"
#include "model/flops.h"
#include "model/gpt.h"
#include "optim/optimizer.h"
#include "options.h"

int run_prepare(const PrepareOptions& options);
int run_generate(const GenerateOptions& options);
int run_evaluate(const EvaluateOptions& options);
int run_info(const TrainOptions& options);

/// The mean loss over rows [0, rows) of the data in file order, `batch_size` rows at a time; nats per token.
/// The ranks of the model's context take batches in turn.
double mean_loss(Gpt& model, const Loader& data, int64_t rows, int64_t batch_size);

/// The first line of log.jsonl: configuration, seed, device, revision, parameter count.
nlohmann::ordered_json run_line(const TrainOptions& options, const Gpt& model, const OptimizerOptions& rules,
                                const MachineRates& rates);

/// What to tell after a non-finite loss at `step`: names the first weight or gradient that is not finite.
RunError not_finite(const ParameterTable& parameters, int64_t step, const std::string& out);
/// "the last checkpoint is intact: <folder>; lower the step size and use --resume", or that there is none.
std::string resume_advice(const std::string& out);

/// `text` with every byte that is not part of valid UTF-8 replaced by U+FFFD, for logs and terminals.
std::string valid_utf8(const std::string& text);
