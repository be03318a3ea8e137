#include "model/parameters.h"

#include <fmt/format.h>

#include <cmath>
#include <stdexcept>

#include "model/kernels/cast.h"
#include "random.h"

const char* role_name(Role role) {
  switch (role) {
    case Role::hidden:
      return "hidden";
    case Role::embedding:
      return "embedding";
    case Role::position:
      return "position";
    case Role::head:
      return "head";
    case Role::vector:
      return "vector";
    case Role::scalar:
      return "scalar";
  }
  return "?";
}

namespace {
constexpr float kInitStd = 0.02f;  // GPT-2's, for every matrix but the residual projections

/// Adds rows to the table in GPT-2's words.
struct Rows {
  std::vector<Parameter>& rows;
  int layer = -1;

  void add(const std::string& name, Role role, Shape shape, Init init, float std) {
    const std::string prefix = layer < 0 ? "" : fmt::format("h.{}.", layer);
    rows.push_back({.name = prefix + name,
                    .role = role,
                    .layer = layer,
                    .shape = shape,
                    .padded_rows = shape[0],
                    .matrices = 1,
                    .init = init,
                    .init_std = std,
                    .transposed_on_disk = role == Role::hidden});
  }
  void layernorm(const std::string& name, int64_t C) {
    add(name + ".weight", Role::vector, {C}, Init::ones, 0);
    add(name + ".bias", Role::vector, {C}, Init::zeros, 0);
  }
  void linear(const std::string& name, int64_t out, int64_t in, float std, int matrices = 1) {
    add(name + ".weight", Role::hidden, {out, in}, Init::normal, std);
    rows.back().matrices = matrices;
    add(name + ".bias", Role::vector, {out}, Init::zeros, 0);
  }
};
}  // namespace

ParameterTable::ParameterTable(const ModelConfig& config) {
  const int64_t C = config.C;
  // Every block adds two branches to the residual stream; this keeps the variance of their sum.
  const float residual_std = kInitStd / std::sqrt(2.0f * static_cast<float>(config.L));
  Rows table{rows_};
  table.add("wte.weight", Role::embedding, {config.V, C}, Init::normal, kInitStd);
  rows_.back().padded_rows = config.padded_V();
  table.add("wpe.weight", Role::position, {config.positions, C}, Init::normal, kInitStd);
  for (int layer = 0; layer < config.L; ++layer) {
    table.layer = layer;
    table.layernorm("ln_1", C);
    table.linear("attn.c_attn", 3 * C, C, kInitStd, /*matrices=*/3);
    table.linear("attn.c_proj", C, C, residual_std);
    table.layernorm("ln_2", C);
    table.linear("mlp.c_fc", 4 * C, C, kInitStd);
    table.linear("mlp.c_proj", C, 4 * C, residual_std);
  }
  table.layer = -1;
  table.layernorm("ln_f", C);
}

void ParameterTable::allocate(Context& ctx, bool with_gradients) {
  ctx_ = &ctx;
  const bool copies = ctx.dtype != DType::f32;
  for (Parameter& p : rows_) {
    const Shape padded = p.is_matrix() ? Shape{p.padded_rows, p.shape[1]} : p.shape;
    values_.add(&p.value, padded);
    if (copies) compute_.add(&p.compute, ctx.dtype, padded);
    if (with_gradients) grads_.add(&p.grad, padded);
  }
  values_.allocate(ctx);
  compute_.allocate(ctx);
  grads_.allocate(ctx);
  for (Parameter& p : rows_) {  // from here on the padding is out of sight
    if (!copies) p.compute = p.value;
    for (Tensor* tensor : {&p.value, &p.compute, &p.grad}) tensor->shape = p.shape;
  }
}

int64_t ParameterTable::bytes(DType dtype) const {
  int64_t elements = 0;
  for (const Parameter& p : rows_) elements += p.is_matrix() ? p.padded_rows * p.shape[1] : p.size();
  return dtype_bytes(dtype) * elements;
}

void ParameterTable::refresh_compute() {
  for (Parameter& p : rows_)
    if (p.compute.data != p.value.data) cast(*ctx_, {.y = p.compute, .x = p.value});
}

void ParameterTable::initialize(uint64_t seed) {
  for (Parameter& p : rows_) {
    const uint64_t key = mix_bits(seed ^ hash_name(p.name));
    const int64_t cols = p.shape.cols();
    OnHost host(*ctx_, p.value, /*load=*/false);
    float* const first = host->f32();
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < p.shape.rows(); ++row) {
      float* values = first + row * cols;
      Random random(key, static_cast<uint64_t>(row));
      for (int64_t i = 0; i < cols; i += 2) {
        float a = 1, b = 1;  // Init::ones
        if (p.init == Init::normal) random.normal_pair(a, b);
        const float scale = p.init == Init::zeros ? 0.0f : p.init == Init::normal ? p.init_std : 1.0f;
        values[i] = scale * a;
        if (i + 1 < cols) values[i + 1] = scale * b;
      }
    }
    host.store();
  }
  refresh_compute();
}

const Parameter& ParameterTable::at(const std::string& name) const {
  for (const Parameter& p : rows_)
    if (p.name == name) return p;
  throw std::logic_error("no parameter named " + name);
}

Parameter& ParameterTable::at(const std::string& name) {
  return const_cast<Parameter&>(static_cast<const ParameterTable&>(*this).at(name));
}

int64_t ParameterTable::size() const {
  int64_t size = 0;
  for (const Parameter& p : rows_) size += p.size();
  return size;
}
