// What a case of an operation is: shapes, inputs, how to run, what must come out, and how much work it is.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "model/kernels/context.h"

/// One tensor of a case. Every tensor starts with random values, outputs included, so that it shows when an
/// operation reads what it must not, or leaves something unwritten.
struct Operand {
  std::string name;
  Shape shape;
  bool output = false;       // compared with the oracle afterwards
  double scale = 1;          // standard deviation of the random values
  double offset = 0;         // mean of the random values
  int64_t below = 0;         // > 0: int32 in [0, below) instead of floats
  std::string same_as = {};  // shares the memory of this operand: an aliasing that the header allows
  bool half = false;         // an activation, or a weight that products read: bf16 when the context says so
  DType dtype = DType::f32;  // of the others: f32 or f64
};

using Tensors = std::map<std::string, Tensor>;              // what the operation sees
using Values = std::map<std::string, std::vector<double>>;  // the same in float64, for the oracle

/// An operation: a door, or a candidate under the same signature that is to be compared with it.
template <typename Args>
using Op = void (*)(Context&, const Args&);

struct OpCase {
  std::string name;               // "matmul/M=7,N=33,K=65,TN": a filter that reruns this case
  std::vector<Operand> operands;  //
  std::function<void(Context&, const Tensors&)> run;
  std::function<void(Values&)> oracle;        // overwrites the outputs; the dumbest possible loops
  double tolerance;                           // |got - want| <= tolerance (|want| + rms(want))
  double flops = 0;                           // per run, when arithmetic is the limit
  double bytes = 0;                           // per run, when memory is: what must be read and written
  std::function<void(Values&)> prepare = {};  // computes inputs that depend on other inputs
  std::function<int64_t(const Context&)> scratch_bytes = {};
  double half_tolerance = 1.0 / 256;  // what storing `half` operands as bf16 adds to the tolerance
  // For gradients: the output `first` must be the derivative of `loss` with respect to the input `second`.
  std::function<double(const Values&)> loss = {};
  std::vector<std::pair<std::string, std::string>> gradients = {};
};

/// The case with all tensors in float64, but for the `scale` and `guard` of updates, which are float32.
inline OpCase in_float64(OpCase op_case) {
  for (Operand& operand : op_case.operands) {
    operand.half = false;
    if (operand.name != "scale" && operand.name != "guard") operand.dtype = DType::f64;
  }
  op_case.name += ",f64";
  op_case.tolerance = std::min(op_case.tolerance, 1e-12);
  op_case.bytes *= 2;
  return op_case;
}

/// "op/B=1,T=2,C=3"
inline std::string case_name(std::string op, std::initializer_list<std::pair<const char*, int64_t>> sizes) {
  const char* separator = "/";
  for (const auto& [key, size] : sizes) {
    op += std::string(separator) + key + "=" + std::to_string(size);
    separator = ",";
  }
  return op;
}

inline double sum_of_products(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}
