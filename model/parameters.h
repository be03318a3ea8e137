// THE parameter table: one row per tensor of the model. Allocation, initialisation, optimizer assignment,
// checkpoints, telemetry and tests all iterate over it; nothing else knows tensors by number.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/config.h"
#include "model/kernels/context.h"
#include "model/kernels/tensor.h"

/// What a tensor is for decides the norm that it is measured in (DESIGN.md section 3).
enum class Role : uint8_t { hidden, embedding, position, head, vector, scalar };
inline constexpr Role kRoles[] = {Role::hidden, Role::embedding, Role::position,
                                  Role::head,   Role::vector,    Role::scalar};
const char* role_name(Role role);

enum class Init : uint8_t { normal, zeros, ones };

struct Parameter {
  std::string name;  // Hugging Face's, e.g. "h.0.attn.c_attn.weight"
  Role role;
  int layer;            // 0 .. L-1, or -1 outside the blocks
  Shape shape;          // matrices (out, in); embeddings (vocab or positions, C); vectors (n)
  int64_t padded_rows;  // rows in memory, >= shape[0]; the extra ones stay zero
  int matrices;         // matrices stacked along the rows: 3 for the fused q, k, v; else 1
  Init init;
  float init_std;           // for Init::normal
  bool transposed_on_disk;  // Hugging Face stores GPT-2's linear weights as (in, out)
  Tensor value = {};        // (shape) f32, the master; memory for padded_rows rows
  Tensor grad = {};         // (shape) f32; present when training
  Tensor compute = {};      // (shape) what products and look-ups read: value itself, or a bf16 copy of it

  int64_t size() const { return shape.size(); }
  bool is_matrix() const { return shape.rank() == 2; }
  /// Embeddings and positions are stored (vocab, C): the transpose of the paper's (out, in) = (C, vocab).
  bool stored_transposed() const { return role == Role::embedding || role == Role::position; }
  /// With the padding rows: (padded_rows, C).
  Tensor padded_value() const { return padded(value); }
  Tensor padded_compute() const { return padded(compute); }
  Tensor padded_grad() const { return padded(grad); }

 private:
  Tensor padded(const Tensor& t) const { return {t.data, t.dtype, Shape{padded_rows, shape[1]}}; }
};

class ParameterTable {
 public:
  /// Lists the tensors of `config`; no memory yet.
  explicit ParameterTable(const ModelConfig& config);

  /// Takes memory: values, their copies in ctx.dtype if that is another one, and gradients when training.
  void allocate(Context& ctx, bool with_gradients);
  /// Bytes of all values, padding included, stored as `dtype`.
  int64_t bytes(DType dtype) const;
  /// Where the tensors live; null before allocate().
  Context* context() const { return ctx_; }
  /// Makes every `compute` agree with its value, after values were set from outside the optimizer.
  void refresh_compute();
  /// Fills the values: N(0, 0.02), residual projections N(0, 0.02 / sqrt(2 L)), gains 1, biases 0. Each
  /// tensor has its own random stream, derived from `seed` and its name, so that the result does not depend
  /// on order.
  void initialize(uint64_t seed);

  Parameter& at(const std::string& name);
  const Parameter& at(const std::string& name) const;
  std::vector<Parameter>& rows() { return rows_; }
  const std::vector<Parameter>& rows() const { return rows_; }
  auto begin() { return rows_.begin(); }
  auto end() { return rows_.end(); }
  auto begin() const { return rows_.begin(); }
  auto end() const { return rows_.end(); }
  /// Number of parameters, padding excluded.
  int64_t size() const;

 private:
  std::vector<Parameter> rows_;
  Context* ctx_ = nullptr;
  Arena values_{"parameters"};
  Arena compute_{"parameters in bf16"};
  Arena grads_{"gradients"};
};
