#include "model/gpt.h"

#include <algorithm>

#include "model/gpt_layer.h"
#include "model/kernels/attention.h"
#include "model/kernels/cross_entropy.h"
#include "model/kernels/embedding.h"
#include "model/kernels/head_max.h"
#include "model/kernels/layernorm.h"
#include "model/kernels/matmul.h"
#include "model/kernels/reduce.h"

namespace {
void linear_forward(Context& ctx, const Linear& linear, const Tensor& y, const Tensor& x) {
  matmul(ctx, {.c = y, .a = x, .b = linear.weight.compute, .bias = linear.bias.compute, .transpose_b = true});
}

/// dW (+)= dy^T x, db (+)= column sums of dy
void weight_gradient(Context& ctx, const Linear& linear, const Tensor& dy, const Tensor& x, bool accumulate) {
  matmul(ctx, {.c = linear.weight.grad,
               .a = dy,
               .b = x,
               .dbias = linear.bias.grad,
               .transpose_a = true,
               .beta = accumulate ? 1.0f : 0.0f});
}

/// dx = dy W, and the gradients of W and b
void linear_backward(Context& ctx, const Linear& linear, const Tensor& dx, const Tensor& dy, const Tensor& x,
                     bool accumulate) {
  weight_gradient(ctx, linear, dy, x, accumulate);
  matmul(ctx, {.c = dx, .a = dy, .b = linear.weight.compute});
}

/// The first rows of a planned (N, cols) tensor under the batch's own shape; with `first` > 0 (and B = 1)
/// those from `first` on.
Tensor rows(const Tensor& planned, int64_t B, int64_t T, int64_t first = 0) {
  return planned.slice(first, B * T - first).view({B, T - first, planned.cols()});
}
Tensor per_token(const Tensor& planned, int64_t B, int64_t T, int64_t first = 0) {
  return planned.slice(first, B * T - first).view({B, T - first});
}
}  // namespace

void Gpt::run_blocks(const Tensor& tokens, int64_t first, Watch watch) {
  const int64_t B = tokens.shape[0], T = tokens.shape[1], NH = config_.NH;
  if (B * T > max_tokens_ || T > config_.positions)
    throw ShapeError("Gpt: batch " + tokens.shape.str() + " is larger than planned");
  expect(first == 0 || (B == 1 && first < T && can_extend()), "Gpt: this model cannot extend a text");
  const auto x = [&](const Tensor& t) {
    return rows(t, B, T, first);
  };  // (B, T, C), (B, T, 3C) or (B, T, 4C)
  const auto stat = [&](const Tensor& t) { return per_token(t, B, T, first); };  // (B, T)
  const auto per_row = [&](const Tensor& t) { return Tensor(t.data, t.dtype, Shape{B, NH, T}); };

  const auto needed = [&](int64_t layer) {
    if (watcher_ != nullptr) watcher_->weights_needed(static_cast<int>(layer));
  };

  const Tensor delta = x(delta_);  // what the previous branch adds to the residual stream
  Tensor residual;
  needed(LayerWatcher::kOutside);
  for (int64_t l = 0; l < config_.L; ++l) {
    needed(l);
    const Layer& w = blocks_[static_cast<size_t>(l)];
    const LayerActivations& a = activations(l);
    if (l == 0) {
      embedding_forward(
          ctx_,
          {.y = x(a.x),
           .tokens = first == 0 ? tokens : tokens.view({T}).slice(first, T - first).view({1, T - first}),
           .wte = parameters_.at("wte.weight").compute,
           .wpe = parameters_.at("wpe.weight").compute.slice(first, config_.positions - first)});
    }
    layernorm_forward(ctx_, {.y = x(a.ln1),
                             .mean = stat(a.ln1_mean),
                             .rstd = stat(a.ln1_rstd),
                             .x = x(a.x),
                             .gain = w.ln1.gain.value,
                             .bias = w.ln1.bias.value,
                             .residual = residual,
                             .delta = l == 0 ? Tensor() : delta});
    linear_forward(ctx_, w.qkv, x(a.qkv), x(a.ln1));
    attention_forward(ctx_, {.out = rows(a.attention, B, T),
                             .lse = per_row(a.lse),
                             .qkv = rows(a.qkv, B, T),
                             .NH = NH,
                             .first = first,
                             .row_max = watch == Watch::nothing ? Tensor() : per_row(row_max_)});
    if (watch != Watch::nothing)
      head_max(ctx_, {.largest = max_logits_[l],
                      .row_max = per_row(row_max_),
                      .accumulate = watch == Watch::accumulate});
    linear_forward(ctx_, w.proj, delta, x(a.attention));
    layernorm_forward(ctx_, {.y = x(a.ln2),
                             .mean = stat(a.ln2_mean),
                             .rstd = stat(a.ln2_rstd),
                             .x = x(a.x_mid),
                             .gain = w.ln2.gain.value,
                             .bias = w.ln2.bias.value,
                             .residual = x(a.x),
                             .delta = delta});
    matmul(ctx_, {.c = x(a.fc_gelu),
                  .a = x(a.ln2),
                  .b = w.fc.weight.compute,
                  .bias = w.fc.bias.compute,
                  .pre_gelu = x(a.fc),
                  .transpose_b = true});
    linear_forward(ctx_, w.fc_proj, delta, x(a.fc_gelu));
    residual = x(a.x_mid);
  }
  layernorm_forward(ctx_, {.y = x(lnf_),
                           .mean = stat(lnf_mean_),
                           .rstd = stat(lnf_rstd_),
                           .x = x(x_final_),
                           .gain = parameters_.at("ln_f.weight").value,
                           .bias = parameters_.at("ln_f.bias").value,
                           .residual = residual,
                           .delta = delta});
}

const Parameter& Gpt::head_weight() const {
  return parameters_.at(config_.tied ? "wte.weight" : "lm_head.weight");
}

void Gpt::head(const Tensor& targets, const HeadOptions& options) {
  const int64_t N = targets.size();
  const Parameter& weight = head_weight();
  const Tensor target_list = targets.view({N});
  for (int64_t start = 0; start < N; start += logits_.shape[0]) {
    const int64_t count = std::min(logits_.shape[0], N - start);
    const Tensor logits = logits_.slice(0, count);  // (count, padded V)
    const Tensor x = lnf_.slice(start, count);      // (count, C)
    matmul(ctx_, {.c = logits, .a = x, .b = weight.padded_compute(), .transpose_b = true});
    cross_entropy(ctx_, {.losses = losses_.slice(start, count),
                         .logits = logits,
                         .targets = target_list.slice(start, count),
                         .V = config_.V,
                         .grad_scale = static_cast<float>(options.grad_scale / static_cast<double>(N)),
                         .with_gradient = options.with_gradient});
    if (!options.with_gradient) continue;
    const bool add = options.accumulate || start > 0;
    matmul(ctx_,
           {.c = weight.padded_grad(), .a = logits, .b = x, .transpose_a = true, .beta = add ? 1.0f : 0.0f});
    matmul(ctx_, {.c = dln_.slice(start, count), .a = logits, .b = weight.padded_compute()});
  }
}

void Gpt::backward_blocks(const TokenBatch& batch, const MicroBatch& micro) {
  const Tensor& tokens = batch.tokens;
  const int64_t B = tokens.shape[0], T = tokens.shape[1];
  const auto ready = [&](int64_t layer) {
    if (watcher_ != nullptr && micro.last) watcher_->gradients_ready(static_cast<int>(layer));
  };

  const Affine lnf{parameters_.at("ln_f.weight"), parameters_.at("ln_f.bias")};
  layernorm_backward(ctx_, {.dx = rows(dx_, B, T),
                            .dgain = lnf.gain.grad,
                            .dbias = lnf.bias.grad,
                            .dy = rows(dln_, B, T),
                            .x = rows(x_final_, B, T),
                            .mean = per_token(lnf_mean_, B, T),
                            .rstd = per_token(lnf_rstd_, B, T),
                            .gain = lnf.gain.value,
                            .accumulate = micro.accumulate});
  for (int64_t l = config_.L - 1; l >= 0; --l) {
    backward_layer(l, tokens.shape, micro.accumulate);
    ready(l);
  }
  // A tied wte has its gradient as the head already: the embedding's share is added.
  embedding_backward(ctx_, {.dwte = parameters_.at("wte.weight").grad,
                            .dwpe = parameters_.at("wpe.weight").grad,
                            .dy = rows(dx_, B, T),
                            .tokens = tokens,
                            .order = batch.order,
                            .accumulate_wte = config_.tied || micro.accumulate,
                            .accumulate_wpe = micro.accumulate});
  ready(LayerWatcher::kOutside);
}

/// dx_ in and out: the gradient of the residual stream behind the layer, then before it.
void Gpt::backward_layer(int64_t l, Shape batch, bool accumulate) {
  const int64_t B = batch[0], T = batch[1], C = config_.C, NH = config_.NH;
  const auto x = [&](const Tensor& t) { return rows(t, B, T); };
  const auto stat = [&](const Tensor& t) { return per_token(t, B, T); };
  const Tensor dx = x(dx_), dln = x(dln_);                           // (B, T, C)
  const Tensor dfc = x(dwide_);                                      // (B, T, 4C)
  const Tensor dqkv(dwide_.data, dwide_.dtype, Shape{B, T, 3 * C});  // dead while dfc lives, and the reverse
  const Layer& w = blocks_[static_cast<size_t>(l)];
  const LayerActivations& a = activations(l);
  weight_gradient(ctx_, w.fc_proj, dx, x(a.fc_gelu), accumulate);
  matmul(ctx_, {.c = dfc, .a = dx, .b = w.fc_proj.weight.compute, .gelu_input = x(a.fc)});
  linear_backward(ctx_, w.fc, dln, dfc, x(a.ln2), accumulate);
  layernorm_backward(ctx_, {.dx = dx,
                            .dgain = w.ln2.gain.grad,
                            .dbias = w.ln2.bias.grad,
                            .dy = dln,
                            .x = x(a.x_mid),
                            .mean = stat(a.ln2_mean),
                            .rstd = stat(a.ln2_rstd),
                            .gain = w.ln2.gain.value,
                            .dresidual = dx,
                            .accumulate = accumulate});
  linear_backward(ctx_, w.proj, dln, dx, x(a.attention), accumulate);
  attention_backward(ctx_, {.dqkv = dqkv,
                            .dout = dln,
                            .out = x(a.attention),
                            .lse = Tensor(a.lse.data, a.lse.dtype, Shape{B, NH, T}),
                            .qkv = x(a.qkv),
                            .NH = NH});
  linear_backward(ctx_, w.qkv, dln, dqkv, x(a.ln1), accumulate);
  layernorm_backward(ctx_, {.dx = dx,
                            .dgain = w.ln1.gain.grad,
                            .dbias = w.ln1.bias.grad,
                            .dy = dln,
                            .x = x(a.x),
                            .mean = stat(a.ln1_mean),
                            .rstd = stat(a.ln1_rstd),
                            .gain = w.ln1.gain.value,
                            .dresidual = dx,
                            .accumulate = accumulate});
}

void Gpt::add_loss(int64_t N, double scale, bool accumulate) {
  mean(ctx_, {.out = loss_, .x = losses_.slice(0, N), .scale = scale, .accumulate = accumulate});
}

double Gpt::read_loss() {
  return *OnHost(ctx_, loss_)->f64();
}

double Gpt::forward(const Tensor& tokens, const Tensor& targets) {
  const TokenBatch batch = stage_one(tokens, targets);
  run_blocks(batch.tokens);
  head(batch.targets, {});
  add_loss(tokens.size(), 1, false);
  return read_loss();
}

void Gpt::enqueue_forward_backward(const TokenBatch& batch, const MicroBatch& micro) {
  expect(training_, "Gpt::forward_backward: the model was built without training");
  ctx_.begin_phase("forward");
  run_blocks(batch.tokens, 0,
             !watch_logits_     ? Watch::nothing
             : micro.accumulate ? Watch::accumulate
                                : Watch::begin);
  ctx_.begin_phase("head");
  head(batch.targets,
       {.grad_scale = micro.grad_scale, .with_gradient = true, .accumulate = micro.accumulate});
  add_loss(batch.tokens.size(), micro.grad_scale, micro.accumulate);
  ctx_.begin_phase("backward");
  backward_blocks(batch, micro);
}

double Gpt::forward_backward(const Tensor& tokens, const Tensor& targets, double grad_scale,
                             bool accumulate) {
  enqueue_forward_backward(stage_one(tokens, targets), {.grad_scale = grad_scale, .accumulate = accumulate});
  add_loss(tokens.size(), 1, false);
  return read_loss();
}

void Gpt::logits_to_host(int64_t start, int64_t count, float* to) {
  for (int64_t done = 0; done < count; done += logits_.shape[0]) {
    const Tensor chunk = logits_.slice(0, std::min(logits_.shape[0], count - done));
    matmul(ctx_, {.c = chunk,
                  .a = lnf_.slice(start + done, chunk.shape[0]),
                  .b = head_weight().padded_compute(),
                  .transpose_b = true});
    const OnHost host(ctx_, chunk);
    float* const row = to + done * chunk.cols();
    if (chunk.dtype == DType::f32)
      std::copy_n(host->f32(), chunk.size(), row);
    else
      std::transform(host->bf16(), host->bf16() + chunk.size(), row, [](Bf16 x) { return to_float(x); });
  }
}

void Gpt::next_token_logits(const Tensor& tokens, const Tensor& logits, int64_t known) {
  const int64_t B = tokens.shape[0], T = tokens.shape[1];
  run_blocks(stage_one(tokens, tokens).tokens, known);
  for (int64_t b = 0; b < B; ++b) logits_to_host((b + 1) * T - 1, 1, logits.slice(b, 1).f32());
}

void Gpt::all_logits(const Tensor& tokens, const Tensor& logits) {
  run_blocks(stage_one(tokens, tokens).tokens);
  logits_to_host(0, tokens.size(), logits.f32());
}
