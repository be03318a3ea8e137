// GPT-2, forward and backward, as a list of operation calls.
//
//   x = wte[token] + wpe[t]
//   for each layer:  x = x + proj(attention(qkv(LN1(x))))
//                    x = x + proj(gelu(fc(LN2(x))))
//   logits = LNf(x) head^T,   loss = mean over tokens of -log softmax(logits)[target]
//
// where head is wte, or with ModelConfig::tied = false a matrix of its own.
//
// Radford et al. 2019; the gradients are derived by hand in each operation's header. The residual addition is
// part of the layernorm that follows it. The logits exist only for a chunk of rows at a time: the chunk is
// multiplied out, turned into its own gradient in place and folded into dx and dhead before the next one.
//
// Runs where its Context does. Activations and their gradients are stored as ctx.dtype; weights and their
// gradients are float32, with a copy in ctx.dtype for the products (parameters.h). Statistics and losses are
// float32.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/config.h"
#include "model/kernels/context.h"
#include "model/kernels/stream.h"
#include "model/parameters.h"

/// What one layer keeps for the backward pass. N = B*T tokens.
struct LayerActivations {
  Tensor x;                        // (N, C) residual stream that enters the layer
  Tensor ln1, ln1_mean, ln1_rstd;  // (N, C), (N), (N)
  Tensor qkv;                      // (N, 3C)
  Tensor attention, lse;           // (N, C), (N * NH) as (B, NH, T)
  Tensor x_mid;                    // (N, C) residual stream between attention and MLP
  Tensor ln2, ln2_mean, ln2_rstd;  // (N, C), (N), (N)
  Tensor fc, fc_gelu;              // (N, 4C) before and after the GELU
};

/// Tokens where the model computes: made by Gpt::stage().
struct TokenBatch {
  Tensor tokens;   // (B, T) int32
  Tensor targets;  // (B, T) int32
  Tensor order;  // (B * T) int32: the tokens' positions sorted by id, which embedding_backward needs on a GPU
};

/// One micro-batch of an update.
struct MicroBatch {
  double grad_scale = 1;    // 1 / number of micro-batches of the update, on all ranks together
  bool accumulate = false;  // add to the gradients and the loss that are there
  bool last = true;         // gradients are complete afterwards
};

/// Told where a pass is, so that ranks exchange gradients and weights while it goes on (optim/exchange.h).
/// `layer` is 0 .. L-1, or kOutside for what lies outside of the layers, and all vectors.
class LayerWatcher {
 public:
  static constexpr int kOutside = -1;
  virtual ~LayerWatcher() = default;
  /// Work that reads these weights is enqueued next. In every forward pass: kOutside, 0, 1, ...
  virtual void weights_needed(int layer) = 0;
  /// All work that makes these gradients is enqueued, of the last micro-batch: L-1, ..., 0, kOutside.
  virtual void gradients_ready(int layer) = 0;
};

/// One named line of the memory plan.
struct MemoryLine {
  std::string name;
  int64_t bytes;
};

class Gpt {
 public:
  /// A model for batches of up to `max_tokens` = B*T tokens. `training` adds gradients and keeps every
  /// layer's activations; without it all layers share one set. Plans only: nothing is allocated yet.
  /// `micro_batches` is how many batches are staged at once. `watch_logits` adds max_logits().
  Gpt(Context& ctx, const ModelConfig& config, int64_t max_tokens, bool training, int64_t micro_batches = 1,
      bool watch_logits = false);
  ~Gpt();

  /// What allocate() will take, scratch included.
  std::vector<MemoryLine> memory_plan() const;
  void allocate();

  Context& context() const { return ctx_; }
  const ModelConfig& config() const { return config_; }
  int64_t max_tokens() const { return max_tokens_; }
  bool watches_logits() const { return watch_logits_; }
  ParameterTable& parameters() { return parameters_; }
  const ParameterTable& parameters() const { return parameters_; }

  /// Brings `n` batches of (B, T) ids to where the model computes, without waiting: (n, B, T) inputs and
  /// targets in host memory, free again afterwards. What the second last call returned is overwritten.
  std::vector<TokenBatch> stage(const int32_t* inputs, const int32_t* targets, int64_t n, Shape batch);

  /// From now on `watcher` is told where passes are; it must outlive the model's last pass. Null: nobody.
  void watch(LayerWatcher* watcher) { watcher_ = watcher; }

  /// Enqueues one micro-batch: gradients of grad_scale * mean loss are written, or added when `accumulate`,
  /// and so is grad_scale * mean loss itself to loss(): micro-batches add up to the gradient of the whole
  /// batch's mean. Nobody waits.
  void enqueue_forward_backward(const TokenBatch& batch, const MicroBatch& micro);
  /// (1) float64, where the model computes: what enqueue_forward_backward() has summed up, in nats per token.
  const Tensor& loss() const { return loss_; }

  /// (L, NH) float64, where the model computes: the largest attention logit, scaled as softmax sees it, of
  /// each layer and head over the same micro-batches: all since the last that did not accumulate. A NaN
  /// stays. Only of models that watch their logits.
  const Tensor& max_logits() const { return max_logits_; }

  /// The same for a batch in host memory, waiting: the batch's mean loss. `tokens`, `targets`: (B, T) int32,
  /// B*T <= max_tokens, T <= positions, ids < V.
  double forward_backward(const Tensor& tokens, const Tensor& targets, double grad_scale, bool accumulate);
  /// The mean loss alone, in nats per token.
  double forward(const Tensor& tokens, const Tensor& targets);

  /// Logits that follow each row's last token: tokens (B, T) -> logits (B, padded V), both in host memory.
  /// Columns >= V are padding. When `known` > 0, the previous call of this model had the same first `known`
  /// tokens (B = 1): what it left is used again, and only the rest is computed. Needs can_extend().
  void next_token_logits(const Tensor& tokens, const Tensor& logits, int64_t known = 0);
  /// True when every layer keeps its keys and values: in training, and in models of one row.
  bool can_extend() const { return layers_.size() == static_cast<size_t>(config_.L); }
  /// All logits, for tests: (B*T, padded V) in host memory.
  void all_logits(const Tensor& tokens, const Tensor& logits);
  /// Loss of each token of the last forward, (max_tokens), where the model computes.
  Tensor token_losses() const { return losses_; }

 private:
  struct Layer;  // the parameters of one layer, looked up by name once
  struct HeadOptions {
    double grad_scale = 0;
    bool with_gradient = false;
    bool accumulate = false;
  };
  /// What becomes of max_logits().
  enum class Watch : uint8_t { nothing, begin, accumulate };
  /// Everything up to the last layernorm, for tokens from `first` on; earlier ones as the previous call left
  /// them.
  void run_blocks(const Tensor& tokens, int64_t first = 0, Watch watch = Watch::nothing);
  /// Logits, losses and, if asked, the gradients of its weight and of the last layernorm's output, chunk by
  /// chunk.
  void head(const Tensor& targets, const HeadOptions& options);
  const Parameter& head_weight() const;
  /// From the gradient of the last layernorm's output down to the embeddings.
  void backward_blocks(const TokenBatch& batch, const MicroBatch& micro);
  void backward_layer(int64_t l, Shape batch, bool accumulate);
  TokenBatch stage_one(const Tensor& tokens, const Tensor& targets);
  /// Logits after `count` rows of the last layernorm from `start` on, to (count, padded V) in host memory.
  void logits_to_host(int64_t start, int64_t count, float* to);
  /// Sums the last forward's losses into loss().
  void add_loss(int64_t N, double scale, bool accumulate);
  double read_loss();
  int64_t scratch_bytes() const;
  LayerActivations& activations(int64_t layer) {
    return layers_[layers_.size() > 1 ? static_cast<size_t>(layer) : 0];
  }

  Context& ctx_;
  ModelConfig config_;
  int64_t max_tokens_, micro_batches_;
  bool training_, watch_logits_;
  LayerWatcher* watcher_ = nullptr;
  ParameterTable parameters_;
  std::vector<Layer> blocks_;
  std::vector<LayerActivations> layers_;
  Arena activations_arena_{"activations"};
  Arena gradient_arena_{"activation gradients"};

  Tensor delta_;                      // (N, C) output of a branch, before it joins the residual stream
  Tensor x_final_;                    // (N, C) residual stream after the last layer
  Tensor lnf_, lnf_mean_, lnf_rstd_;  // (N, C), (N), (N)
  Tensor logits_;                     // (chunk rows, padded V): one chunk of logits, then of their gradient
  Tensor losses_, loss_;              // (N), (1) float64
  Tensor row_max_, max_logits_;       // (N * NH) as (B, NH, T), of one layer at a time; (L, NH) float64
  Tensor dx_, dln_;                   // (N, C) gradient of the residual stream; of a layernorm's output
  Tensor dwide_;                      // (N, 4C) gradient inside the MLP, or (N, 3C) of qkv
  std::unique_ptr<Upload> upload_;    // tokens, targets and order of the staged batches
};
