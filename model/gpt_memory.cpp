// What a model takes of memory, and how batches come into it; its passes are in gpt.cpp.
#include <algorithm>

#include "model/gpt_layer.h"
#include "model/kernels/attention.h"
#include "model/kernels/embedding.h"
#include "model/kernels/layernorm.h"
#include "model/kernels/matmul.h"

namespace {
/// Bytes of logits held at once. Large chunks read and write dwte fewer times and fill a GPU; on a CPU small
/// ones stay in cache.
int64_t logit_bytes(const Context& ctx) {
  return ctx.where == Where::cpu ? int64_t{50} << 20  // 256 rows of GPT-2's vocabulary
                                 : int64_t{2} << 30;  // 21,000 rows in bf16
}

/// Rows of one chunk of logits: as few chunks as fit, of equal size.
int64_t logit_rows(const Context& ctx, const ModelConfig& config, int64_t N) {
  const int64_t most =
      std::max<int64_t>(logit_bytes(ctx) / (dtype_bytes(ctx.dtype) * config.padded_V()) / 64 * 64, 64);
  if (ctx.where == Where::cpu || N <= most) return std::min(most, N);
  const int64_t chunks = (N + most - 1) / most;
  return std::min(most, ((N + chunks - 1) / chunks + 63) / 64 * 64);
}
}  // namespace

Gpt::Gpt(Context& ctx, const ModelConfig& config, int64_t max_tokens, bool training, int64_t micro_batches,
         bool watch_logits)
    : ctx_(ctx),
      config_(config),
      max_tokens_(max_tokens),
      micro_batches_(micro_batches),
      training_(training),
      watch_logits_(watch_logits),
      parameters_(config) {
  for (int64_t l = 0; l < config.L; ++l) blocks_.emplace_back(parameters_, "h." + std::to_string(l) + ".");

  const int64_t N = max_tokens, C = config.C;
  const bool one_row = max_tokens <= config.positions;
  layers_.resize(training || one_row ? static_cast<size_t>(config.L) : 1);
  Arena& keep = activations_arena_;
  const DType half = ctx.dtype;
  for (LayerActivations& a : layers_) {
    if (!training && &a != &layers_[0]) {  // the rest is shared with layer 0, see allocate()
      keep.add(&a.qkv, half, {N, 3 * C});
      continue;
    }
    keep.add(&a.x, half, {N, C});
    keep.add(&a.ln1, half, {N, C});
    keep.add(&a.ln1_mean, {N});
    keep.add(&a.ln1_rstd, {N});
    keep.add(&a.qkv, half, {N, 3 * C});
    keep.add(&a.attention, half, {N, C});
    keep.add(&a.lse, {N * config.NH});
    keep.add(&a.x_mid, half, {N, C});
    keep.add(&a.ln2, half, {N, C});
    keep.add(&a.ln2_mean, {N});
    keep.add(&a.ln2_rstd, {N});
    keep.add(&a.fc, half, {N, 4 * C});
    keep.add(&a.fc_gelu, half, {N, 4 * C});
  }
  keep.add(&delta_, half, {N, C});
  keep.add(&x_final_, half, {N, C});
  keep.add(&lnf_, half, {N, C});
  keep.add(&lnf_mean_, {N});
  keep.add(&lnf_rstd_, {N});
  keep.add(&logits_, half, {logit_rows(ctx, config, N), config.padded_V()});
  keep.add(&losses_, {N});
  keep.add(&loss_, DType::f64, {1});
  if (watch_logits) {
    keep.add(&row_max_, {N * config.NH});
    keep.add(&max_logits_, DType::f64, {config.L, config.NH});
  }
  if (!training) return;
  gradient_arena_.add(&dx_, half, {N, C});
  gradient_arena_.add(&dln_, half, {N, C});
  gradient_arena_.add(&dwide_, half, {N, 4 * C});
}

Gpt::~Gpt() = default;

int64_t Gpt::scratch_bytes() const {
  const int64_t N = max_tokens_, C = config_.C, T = std::min(N, config_.positions);
  return std::max({attention_scratch_bytes(ctx_, (N + T - 1) / T, T, config_.NH, config_.HS()),
                   layernorm_backward_scratch_bytes(ctx_, C), dbias_scratch_bytes(ctx_, N, 4 * C),
                   embedding_backward_scratch_bytes(ctx_, N, C)});
}

std::vector<MemoryLine> Gpt::memory_plan() const {
  std::vector<MemoryLine> plan = {{"parameters", parameters_.master_bytes(ctx_)}};
  if (ctx_.dtype != DType::f32) plan.push_back({"parameters in bf16", parameters_.bytes(ctx_.dtype)});
  if (training_) plan.push_back({"gradients", parameters_.bytes(DType::f32)});
  plan.push_back({activations_arena_.name(), activations_arena_.bytes()});
  if (training_) plan.push_back({gradient_arena_.name(), gradient_arena_.bytes()});
  plan.push_back({"scratch", scratch_bytes()});
  return plan;
}

void Gpt::allocate() {
  parameters_.allocate(ctx_, training_);
  activations_arena_.allocate(ctx_);
  for (size_t l = 1; !training_ && l < layers_.size(); ++l) {
    const Tensor qkv = layers_[l].qkv;
    layers_[l] = layers_[0];
    layers_[l].qkv = qkv;
  }
  gradient_arena_.allocate(ctx_);
  ctx_.scratch.reserve(scratch_bytes());
  upload_ = std::make_unique<Upload>(ctx_, 3 * max_tokens_ * micro_batches_);
}

std::vector<TokenBatch> Gpt::stage(const int32_t* inputs, const int32_t* targets, int64_t n, Shape batch) {
  const int64_t N = batch.size(), all = n * N;
  if (N > max_tokens_ || n > micro_batches_)
    throw ShapeError("Gpt: " + std::to_string(n) + " batches of " + batch.str() + " are more than planned");
  const bool sorted = training_ && ctx_.where == Where::gpu;
  int32_t* const staging = upload_->staging();
  std::copy_n(inputs, all, staging);
  std::copy_n(targets, all, staging + all);
  for (int64_t i = 0; sorted && i < n; ++i)
    sort_tokens({inputs + i * N, static_cast<size_t>(N)}, config_.V,
                {staging + 2 * all + i * N, static_cast<size_t>(N)});
  const Tensor ids = upload_->send((sorted ? 3 : 2) * all);
  std::vector<TokenBatch> batches;
  for (int64_t i = 0; i < n; ++i)
    batches.push_back({.tokens = ids.slice(i * N, N).view(batch),
                       .targets = ids.slice(all + i * N, N).view(batch),
                       .order = sorted ? ids.slice(2 * all + i * N, N) : Tensor()});
  return batches;
}

TokenBatch Gpt::stage_one(const Tensor& tokens, const Tensor& targets) {
  return stage(tokens.i32(), targets.i32(), 1, tokens.shape)[0];
}
