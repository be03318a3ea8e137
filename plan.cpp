#include "plan.h"

#include <fmt/format.h>

#include <algorithm>

#include "error.h"
#include "setup.h"

namespace {
double mebibytes(int64_t bytes) {
  return static_cast<double>(bytes) / (1024.0 * 1024.0);
}

/// What a run takes, or a rank of it, line by line, before anything is allocated. Where this is one process
/// that only asks about `ranks`, it is the most that any of them would take. `real` is the model that the
/// optimizer has shared out; `model` may be the same with another batch.
std::vector<MemoryLine> memory_plan(const Gpt& model, const Gpt& real, const Optimizer& optimizer,
                                    const Telemetry& telemetry, int ranks) {
  const Context& ctx = model.context();
  const bool asks = ctx.comm->alone() && ranks > 1;
  const RankInfo most = asks ? optimizer.most_of_a_rank(ranks) : RankInfo{};
  std::vector<MemoryLine> plan = model.memory_plan();
  plan.front().bytes = asks && ctx.dtype != DType::f32 ? dtype_bytes(DType::f32) * most.parameters
                                                       : real.parameters().master_bytes(ctx);
  plan.back().bytes = std::max(
      {plan.back().bytes, optimizer.scratch_bytes(), telemetry.scratch_bytes()});  // scratch is shared
  plan.push_back({"optimizer state", asks ? most.state_bytes + most.aside_bytes : optimizer.state_bytes()});
  if (telemetry.bytes() > 0) plan.push_back({"telemetry", telemetry.bytes()});
  return plan;
}

int64_t total(const std::vector<MemoryLine>& plan) {
  int64_t bytes = 0;
  for (const MemoryLine& line : plan) bytes += line.bytes;
  return bytes;
}

/// The largest batch whose plan fits in `memory`; 0 when not even one row does.
int64_t largest_batch(const Gpt& model, const Optimizer& optimizer, const Telemetry& telemetry,
                      const TrainOptions& options, int64_t memory) {
  const auto fits = [&](int64_t B) {
    return total(memory_plan(Gpt(model.context(), model.config(), B * options.seq_len, /*training=*/true,
                                 /*micro_batches=*/1, model.watches_logits()),
                             model, optimizer, telemetry, options.ranks)) <= memory;
  };
  int64_t good = 0, bad = 1;
  while (bad < int64_t{1} << 20 && fits(bad)) good = bad, bad *= 2;
  while (bad - good > 1) (fits((good + bad) / 2) ? good : bad) = (good + bad) / 2;
  return good;
}
}  // namespace

void print_plan(const TrainOptions& options, const Gpt& model, const Optimizer& optimizer,
                const Telemetry& telemetry) {
  const ModelConfig& c = model.config();
  const Context& ctx = model.context();
  const int64_t memory = usable_memory(ctx);
  const std::vector<MemoryLine> plan = memory_plan(model, model, optimizer, telemetry, options.ranks);
  const int64_t largest = largest_batch(model, optimizer, telemetry, options, memory);
  std::string lines;
  for (const MemoryLine& line : plan) lines += fmt::format(", {} {:.1f}", line.name, mebibytes(line.bytes));
  fmt::print("device     {}\n", describe_device(ctx));
  fmt::print(
      "model      {}: {} layers, {} heads, {} channels, {} positions, vocabulary {}; {:.2f}M parameters\n",
      c.name, c.L, c.NH, c.C, c.positions, c.V, static_cast<double>(model.parameters().size()) / 1e6);
  const std::string ranks = options.ranks > 1 ? fmt::format(" x {} ranks", options.ranks) : "";
  fmt::print("batch      {} x {} tokens x {} micro-batches{} = {} tokens per step; up to {} x {} would fit\n",
             options.batch_size, options.seq_len, options.grad_accum, ranks, options.tokens_per_step(),
             largest, options.seq_len);
  if (!ctx.comm->alone()) fmt::print("ranks      {}\n", ctx.comm->name());
  fmt::print("memory     {:.1f} MiB{} of {:.1f}: {}\n", mebibytes(total(plan)),
             options.ranks > 1 ? " for each rank" : "", mebibytes(memory), lines.substr(2));
  const QkClipOptions qk_clip = choose_qk_clip(options);
  if (qk_clip.on())
    fmt::print("qk-clip    heads whose attention logits exceed {:g}; q takes {:g} of the shrinking\n",
               qk_clip.tau, qk_clip.alpha);
  std::fflush(stdout);
}

void expect_memory(const TrainOptions& options, const Gpt& model, const Optimizer& optimizer,
                   const Telemetry& telemetry) {
  const int64_t memory = usable_memory(model.context()),
                bytes = total(memory_plan(model, model, optimizer, telemetry, options.ranks));
  if (bytes <= memory) return;
  throw RunError(fmt::format(
      "the plan needs {:.1f} GiB and {} has {:.1f}, --model {} --batch-size {}, use a smaller model, or "
      "a smaller batch with a larger --grad-accum (up to {} rows fit)",
      mebibytes(bytes) / 1024, model.context().device ? "the GPU" : "this machine", mebibytes(memory) / 1024,
      options.model, options.batch_size, largest_batch(model, optimizer, telemetry, options, memory)));
}
