#include "model/parameters.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

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
  if (config.tied) return;
  table.add("lm_head.weight", Role::head, {config.V, C}, Init::normal, kInitStd);
  rows_.back().padded_rows = config.padded_V();
}

Tensor Parameter::master(int64_t first, int64_t rows) const {
  for (const MasterRows& m : masters)
    if (m.first <= first && first + rows <= m.first + m.values.shape[0])
      return m.values.slice(first - m.first, rows);
  throw std::logic_error(name + ": these rows of the master are another rank's");
}

bool ParameterTable::shared_out(const Parameter& p, const Context& ctx) const {
  return !owned_.empty() && p.is_matrix() && ctx.dtype != DType::f32;
}

/// In which order tensors lie in memory: hidden matrices by the shape of a single one, then the rest.
std::vector<Parameter*> ParameterTable::in_banks() {
  std::vector<Parameter*> order;
  for (Parameter& p : rows_) order.push_back(&p);
  std::ranges::stable_sort(order, {}, [](const Parameter* p) {
    const bool hidden = p->role == Role::hidden && p->is_matrix();
    return hidden ? std::pair{p->shape[0] / p->matrices, p->shape[1]} : std::pair{INT64_MAX, INT64_MAX};
  });
  return order;
}

void ParameterTable::plan_masters(Parameter& p, const Context& ctx) {
  p.masters.clear();
  if (!shared_out(p, ctx)) {
    values_.add(&p.value, p.is_matrix() ? Shape{p.padded_rows, p.shape[1]} : p.shape);
    return;
  }
  for (const OwnedRows& o : owned_)
    if (&rows_.at(o.parameter) == &p && o.owner == ctx.comm->rank())
      p.masters.push_back({.first = o.first, .values = {nullptr, DType::f32, {o.rows, p.shape[1]}}});
  for (MasterRows& m : p.masters) values_.add(&m.values, m.values.shape);
}

void ParameterTable::allocate(Context& ctx, bool with_gradients) {
  ctx_ = &ctx;
  const bool copies = ctx.dtype != DType::f32;
  for (Parameter* p : in_banks()) {
    const Shape padded = p->is_matrix() ? Shape{p->padded_rows, p->shape[1]} : p->shape;
    plan_masters(*p, ctx);
    if (copies) compute_.add(&p->compute, ctx.dtype, padded);
    if (with_gradients) grads_.add(&p->grad, padded);
  }
  values_.allocate(ctx);
  compute_.allocate(ctx);
  grads_.allocate(ctx);
  for (Parameter& p : rows_) {  // from here on the padding is out of sight
    if (!copies) p.compute = p.value;
    for (Tensor* tensor : {&p.value, &p.compute, &p.grad}) tensor->shape = p.shape;
    if (p.value) p.masters = {{.first = 0, .values = p.value}};
  }
}

int64_t ParameterTable::master_bytes(const Context& ctx) const {
  int64_t elements = 0;
  for (const Parameter& p : rows_)
    if (!shared_out(p, ctx)) elements += p.is_matrix() ? p.padded_rows * p.shape[1] : p.size();
  for (const OwnedRows& o : owned_) {
    const Parameter& p = rows_.at(o.parameter);
    if (shared_out(p, ctx) && o.owner == ctx.comm->rank()) elements += o.rows * p.shape[1];
  }
  return dtype_bytes(DType::f32) * elements;
}

int64_t ParameterTable::bytes(DType dtype) const {
  int64_t elements = 0;
  for (const Parameter& p : rows_) elements += p.is_matrix() ? p.padded_rows * p.shape[1] : p.size();
  return dtype_bytes(dtype) * elements;
}

void ParameterTable::set(Parameter& p, const std::function<void(float*)>& fill) {
  if (p.value) {
    OnHost host(*ctx_, p.value, /*load=*/false);
    fill(host->f32());
    host.store();
    if (p.compute.data != p.value.data) cast(*ctx_, {.y = p.compute, .x = p.value});
    return;
  }
  std::vector<float> whole(static_cast<size_t>(p.size()));
  fill(whole.data());
  const auto line = static_cast<size_t>(p.shape.cols());
  for (const MasterRows& m : p.masters) {
    OnHost host(*ctx_, m.values, /*load=*/false);
    std::copy_n(whole.data() + static_cast<size_t>(m.first) * line, m.values.size(), host->f32());
    host.store();
  }
  OnHost copy(*ctx_, p.compute, /*load=*/false);
  std::ranges::transform(whole, copy->bf16(), to_bf16);
  copy.store();
}

void ParameterTable::initialize(uint64_t seed) {
  for (Parameter& p : rows_) {
    const uint64_t key = mix_bits(seed ^ hash_name(p.name));
    const int64_t cols = p.shape.cols();
    set(p, [&](float* const first) {
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
    });
  }
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
