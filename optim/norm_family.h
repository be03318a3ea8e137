// How a norm is made: norms that are computed the same way, but for a factor of out and in, are a family, and
// a family is one file, norm_NAME.cpp. To add a norm of a new kind: write its family (norm_nuclear.cpp is the
// one to read first), name it here, and give it a kind in norm.h and a row in the table of norm.cpp. Rules,
// options, `info`, telemetry and the property tests follow from the table.
#pragma once

#include "optim/norm.h"

/// The matrices that are measured, as they are stored.
struct NormInput {
  Norm norm;
  Tensor x;                 // (batch, rows, cols), f32 or f64
  bool transposed = false;  // rows are the paper's columns
};

/// Where dual vectors go.
struct DualOutput {
  Tensor out;           // (batch, rows, cols), written; may be the input. Absent: not kept
  double scale = 1;     // of everything
  ApplyTo into = {};    // the weight that they move
  Tensor lengths = {};  // of lengths_of(), where they are known
};

class NormFamily {
 public:
  NormFamily() = default;
  virtual ~NormFamily() = default;
  NormFamily(const NormFamily&) = delete;
  NormFamily& operator=(const NormFamily&) = delete;

  /// The norm, or the dual norm, of every matrix, without norm_scale(). Waits.
  virtual void values(Context& ctx, const NormInput& in, bool dual, std::span<double> values) const = 0;
  /// out = scale times the dual vector of every matrix; `to` moves a weight only where moves().
  virtual void dualize(Context& ctx, const NormInput& in, const DualOutput& to,
                       const PolarMethod& polar) const = 0;
  /// True when dualize() can move a weight in the same pass over memory.
  virtual bool moves(const Norm&) const { return false; }
  /// lengths_of() of norm.h.
  virtual Lengths lengths(const Norm&, bool transposed) const {
    (void)transposed;
    return Lengths::none;
  }
  /// True when dualize() computes on the host.
  virtual bool on_host(const PolarMethod&) const { return false; }
  /// Scratch of both, for a batch (batch, rows, cols) stored either way round.
  virtual int64_t scratch_bytes(const Context& ctx, const Shape& batch, DType dtype,
                                const PolarMethod& polar) const = 0;
};

const NormFamily& whole_norms();       // all entries together: frobenius, rms
const NormFamily& entry_norms();       // entry by entry: l1-linf and its multiples
const NormFamily& spectral_norms();    // the largest singular value: l2-l2 and its multiples
const NormFamily& nuclear_norms();     // the sum of singular values
const NormFamily& norms_of_columns();  // the largest column: l1-lp, l1-rms
const NormFamily& norms_of_rows();     // the largest row: lp-linf, rms-linf

// What families share.

/// max that lets a NaN through.
double larger(double a, double b);
/// values[i] = the largest, or the sum, of the i-th of equal parts of `list`.
template <typename T>
void combine(const T* list, int64_t count, bool sum, std::span<double> values) {
  const int64_t part = count / static_cast<int64_t>(values.size());
  for (double& value : values) {
    value = 0;
    for (int64_t i = 0; i < part; ++i, ++list) value = sum ? value + *list : larger(*list, value);
  }
}
/// The largest, or the sum, of the singular values of every matrix, by LAPACK on the host.
void combine_singular_values(Context& ctx, const Tensor& x, bool sum, std::span<double> values);
/// y = scale x.
void copy_scaled(Context& ctx, const Tensor& y, const Tensor& x, double scale);
