// THE parameter table: one row per tensor of the model. Allocation, initialisation, optimizer assignment,
// checkpoints, telemetry and tests all iterate over it; nothing else knows tensors by number.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
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

/// Some rows of a parameter's float32 values.
struct MasterRows {
  int64_t first;  // of the parameter's rows
  Tensor values;  // (rows, cols) or (rows), f32
};

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
  Tensor value = {};    // (shape) f32, the master, with memory for padded_rows rows; without data where ranks
                        // share it out (keep_masters())
  Tensor grad = {};     // (shape) f32; present when training
  Tensor compute = {};  // (shape) what products and look-ups read: value itself, or a bf16 copy of it
  std::vector<MasterRows> masters = {};  // what is here of the float32 values: all of them, or rows of them

  int64_t size() const { return shape.size(); }
  bool is_matrix() const { return shape.rank() == 2; }
  /// Embeddings and positions are stored (vocab, C): the transpose of the paper's (out, in) = (C, vocab).
  bool stored_transposed() const { return role == Role::embedding || role == Role::position; }
  /// Rows [first, first + rows) of the float32 values; std::logic_error unless they are here, in one piece.
  Tensor master(int64_t first, int64_t rows) const;
  /// With the padding rows: (padded_rows, C).
  Tensor padded_value() const { return padded(value); }
  Tensor padded_compute() const { return padded(compute); }
  Tensor padded_grad() const { return padded(grad); }

 private:
  Tensor padded(const Tensor& t) const { return {t.data, t.dtype, Shape{padded_rows, shape[1]}}; }
};

/// Rows of a parameter that one rank owns.
struct OwnedRows {
  size_t parameter;     // its index in the table
  int64_t first, rows;  // along the first dimension
  int owner;
};

class ParameterTable {
 public:
  /// Lists the tensors of `config`; no memory yet.
  explicit ParameterTable(const ModelConfig& config);

  /// For several ranks, before allocate(): who owns which rows, all of all parameters in order. Where
  /// matrices have copies for products, a rank then keeps the float32 values of its own rows alone. Vectors
  /// stay whole: layernorms and biases read them.
  void keep_masters(std::vector<OwnedRows> owned) { owned_ = std::move(owned); }
  /// Takes memory: values, their copies in ctx.dtype if that is another one, and gradients when training. In
  /// each of these the hidden matrices lie in banks: all (out, in) of one shape one after the other, the
  /// three of a fused q, k, v among them.
  void allocate(Context& ctx, bool with_gradients);
  /// Bytes of all values, padding included, stored as `dtype`.
  int64_t bytes(DType dtype) const;
  /// Bytes of the float32 values that allocate() takes.
  int64_t master_bytes(const Context& ctx) const;
  /// Where the tensors live; null before allocate().
  Context* context() const { return ctx_; }
  /// Sets a parameter from outside the optimizer: `fill` writes all its values, row-major, into memory of the
  /// host. What is here of the master becomes these, and the copy for products is rounded from them.
  void set(Parameter& p, const std::function<void(float*)>& fill);
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
  bool shared_out(const Parameter& p, const Context& ctx) const;
  std::vector<Parameter*> in_banks();
  void plan_masters(Parameter& p, const Context& ctx);

  std::vector<Parameter> rows_;
  std::vector<OwnedRows> owned_;
  Context* ctx_ = nullptr;
  Arena values_{"parameters"};
  Arena compute_{"parameters in bf16"};
  Arena grads_{"gradients", 4};  // beside the values in a step, and elsewhere in its page
};
