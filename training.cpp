#include "training.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>

#include "commands.h"
#include "error.h"
#include "files.h"
#include "model/checkpoint.h"
#include "model/generate.h"
#include "norms_report.h"

namespace {
double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
}  // namespace

void Training::enqueue_step() {
  const int64_t step = next_step();
  const double start = seconds_now();
  const BatchReader::Batch batch = batches.next();
  const std::vector<TokenBatch> micro =
      model.stage(batch.inputs, batch.targets, options.grad_accum, {options.batch_size, options.seq_len});
  if (telemetry.due(step)) {
    measure(step, micro);
  } else {
    graph.run([&] {
      gradients(micro);
      update(step, /*keep_directions=*/false);
    });
  }
  enqueued.push_back(
      {step, losses.mark(), optimizer.mark(), qk_clip != nullptr ? qk_clip->mark() : -1, start});
}

/// The gradient of the mean loss of the global batch: summed over the micro-batches here, and over the ranks
/// on its way to the owners.
void Training::gradients(const std::vector<TokenBatch>& micro) {
  const size_t count = micro.size();
  for (size_t i = 0; i < count; ++i) {
    watch.pulse();
    model.enqueue_forward_backward(micro[i], {.grad_scale = 1.0 / static_cast<double>(count * comm.size()),
                                              .accumulate = i > 0,
                                              .last = i + 1 == count});
  }
  exchange.finish_gradients();
}

void Training::update(int64_t step, bool keep_directions) {
  optimizer.step(step, options.steps, keep_directions);
  if (qk_clip != nullptr) qk_clip->step(optimizer.guard());
  exchange.send_rest();
  losses.fetch(model.loss());
}

/// The same step with telemetry, which waits, and looks at everything on every rank.
void Training::measure(int64_t step, const std::vector<TokenBatch>& micro) {
  finish_steps(0);  // so that the log stays in order
  norms = telemetry.measure({.t = step,
                             .gradients =
                                 [&] {
                                   gradients(micro);
                                   exchange.gather_gradients();
                                   double loss = OnHost(model.context(), model.loss())->f64()[0];
                                   comm.sum({&loss, 1});
                                   return loss;
                                 },
                             .update =
                                 [&] {
                                   update(step, /*keep_directions=*/true);
                                   exchange.gather_gradients();
                                 },
                             .gather = [&](std::span<const Tensor> whole) { exchange.gather(whole); }});
  log.write(norms_line(*norms));
}

void Training::finish_steps(size_t leave) {
  for (; enqueued.size() > leave; enqueued.pop_front(), ++state.step) finish(enqueued.front());
}

void Training::finish(const Enqueued& step) {
  const double loss = losses.wait(step.loss)[0];
  if (!std::isfinite(loss)) throw not_finite(model.parameters(), step.step, options.out);
  StepReport report;
  try {
    report = optimizer.report(step.report);
  } catch (const RunError& error) {
    throw RunError(fmt::format("{}; {}", error.what(), resume_advice(options.out)));
  }
  const double end = seconds_now(), seconds = end - std::max(step.start, last_end);
  last_end = end;
  state.train_seconds += seconds;
  const int64_t tokens = options.tokens_per_step();
  const double speed = static_cast<double>(tokens) / seconds;
  const int ranks = comm.size();
  const double flops = train_flops_per_token(model.config(), options.seq_len) * speed / ranks;
  const double floor =
      floor_seconds(model.config(), options.seq_len, model.context().dtype, tokens / ranks, rates);
  nlohmann::ordered_json line = {{"type", "train"},
                                 {"step", step.step},
                                 {"tokens", step.step * tokens},
                                 {"loss", loss},
                                 {"grad_norm", report.grad_norm},
                                 {"lr", report.lr},
                                 {"step_ms", seconds * 1e3},
                                 {"tokens_per_second", speed},
                                 {"mfu", flops / rates.flops},
                                 {"speed_of_light", floor / seconds}};
  if (qk_clip != nullptr) line["max_logit"] = qk_clip->max_logit(step.clip);
  if (report.eta > 0) line["eta"] = report.eta;
  if (!comm.alone()) add_costs(line, seconds);
  log.write(line);
  progress.update({step.step + 1, loss, state.val_loss, speed});
}

/// What this rank's exchanges took since the last step was logged.
void Training::add_costs(nlohmann::ordered_json& line, double seconds) {
  const CommCosts now = comm.costs();
  const double exposed = now.exposed - last_costs.exposed;
  line["comm_busy_ms"] = (now.busy - last_costs.busy) * 1e3;
  line["comm_exposed_ms"] = exposed * 1e3;
  line["comm_bytes"] = now.sent - last_costs.sent;
  last_costs = now;
  watch.worked(std::max(0.0, seconds - exposed));
}

void Training::name_slow_rank() {
  const std::string slow = watch.slow_rank();
  if (slow.empty()) return;
  log.write({{"type", "slow_rank"}, {"step", state.step}, {"text", slow}});
  progress.say(slow);
}

void Training::verify() {
  if (comm.alone()) return;
  const auto doing = watch.now("comparing parameters");
  exchange.finish_weights();
  name_slow_rank();
  uint64_t checksum = 0;
  for (const Parameter& p : model.parameters()) {
    const OnHost host(model.context(), p.compute);
    checksum = hash_bytes(host->data, host->bytes(), checksum);
  }
  watch.compare(state.step, checksum);
}

void Training::validate() {
  const auto doing = watch.now("validating");
  exchange.finish_weights();
  const int64_t rows = std::clamp<int64_t>(options.val_tokens / options.seq_len, 1, val_data.chunks());
  state.val_loss = mean_loss(model, val_data, rows, options.batch_size);
  if (!std::isfinite(state.val_loss)) throw not_finite(model.parameters(), state.step, options.out);
  log.write({{"type", "val"},
             {"step", state.step},
             {"tokens", state.step * options.tokens_per_step()},
             {"loss", state.val_loss}});
  progress.say(fmt::format("step {}/{}  validation loss {:.6f} over {} tokens", state.step, options.steps,
                           state.val_loss, rows * options.seq_len));
}

void Training::sample() {
  exchange.finish_weights();
  if (tokenizer == nullptr || comm.rank() != 0) return;
  const auto doing = watch.now("sampling");
  const std::vector<int32_t> drawn = generate(model, {tokenizer->end_of_text()},
                                              {.tokens = options.sample_tokens,
                                               .seed = options.seed,
                                               .end_of_text = tokenizer->end_of_text(),
                                               .context = options.seq_len});
  const std::string text = valid_utf8(tokenizer->decode(drawn));
  log.write({{"type", "sample"}, {"step", state.step}, {"text", text}});
  progress.say(fmt::format("--- sample after step {} ---\n{}\n---", state.step, text));
}

void Training::checkpoint() {
  const auto doing = watch.now("writing a checkpoint");
  exchange.finish_weights();
  const std::vector<NamedTensor> optimizer_state = optimizer.state();
  const std::vector<OwnedRows> owned = optimizer.owned_rows();
  const std::string folder =
      save_checkpoint({.out = options.out,
                       .step = state.step,
                       .config = model.config(),
                       .parameters = model.parameters(),
                       .owned = owned,
                       .optimizer = optimizer_state,
                       .state = state_to_json(state, options, identity),
                       .tokenizer = tokenizer != nullptr ? tokenizer->json() : "",
                       .end_of_text = tokenizer != nullptr ? tokenizer->end_of_text() : -1,
                       .keep = options.keep,
                       .existing = Existing::replace});
  log.write({{"type", "checkpoint"}, {"step", state.step}, {"path", folder}});
}
