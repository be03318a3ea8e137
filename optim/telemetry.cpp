#include "optim/telemetry.h"

#include <algorithm>
#include <cmath>

#include "model/kernels/reduce.h"
#include "optim/svd.h"
#include "optim/update.h"

namespace {
/// Polar Express rises fast, the convergent steps then end at 1: singular values above 1e-3 of the Frobenius
/// norm reach it, and smaller ones hardly count in their sum.
const PolarMethod& precise_polar() {
  static const PolarMethod precise = [] {
    PolarMethod method = polar_method("polar-express", 5);
    const PolarMethod end = polar_method("quintic12", 3);
    method.name = "precise";
    method.steps.insert(method.steps.end(), end.steps.begin(), end.steps.end());
    return method;
  }();
  return precise;
}

/// Matrix i of a parameter's tensor.
Tensor block_of(const Tensor& tensor, int i, const Parameter& p) {
  const int64_t rows = tensor.shape[0] / p.matrices;
  return tensor.slice(i * rows, rows);
}

double factor_of(const Norm& norm, const Tensor& block, const Parameter& p) {
  const int64_t rows = block.shape[0], cols = block.shape[1];
  return p.stored_transposed() ? norm_scale(norm, cols, rows) : norm_scale(norm, rows, cols);
}

/// max that lets a NaN through.
double larger(double a, double b) {
  return a > b || std::isnan(a) ? a : b;
}

bool has_band(const Parameter& p, const Norm& norm) {
  return p.is_matrix() && (is_spectral(norm) || !p.stored_transposed());
}

bool small(const Tensor& block) {
  return std::min(block.rows(), block.cols()) <= Telemetry::kExactSide;
}
}  // namespace

double nuclear_norm(Context& ctx, const Tensor& g) {
  Scratch::Frame frame(ctx.scratch);
  const Tensor factor = frame.tensor({1, g.shape[0], g.shape[1]});
  smooth(ctx, {.u = factor, .g = g});
  polar(ctx, {.x = factor, .method = precise_polar()});
  return dot(ctx, g, factor[0]);
}

int64_t nuclear_norm_scratch_bytes(const Context& ctx, int64_t rows, int64_t cols) {
  return 4 * rows * cols + std::max(polar_scratch_bytes(ctx, {1, rows, cols}, DType::f32, precise_polar()),
                                    whole_scratch_bytes());
}

Telemetry::Telemetry(Context& ctx, const ParameterTable& table, const Optimizer& optimizer, int64_t every)
    : ctx_(ctx), optimizer_(optimizer), every_(every) {
  for (const Parameter& p : table) kept_.push_back({.parameter = &p, .change = {}, .gradient = {}});
  for (Kept& kept : kept_) {  // kept_ no longer grows: the arena keeps pointers to its tensors
    arena_.add(&kept.change, kept.parameter->shape);
    arena_.add(&kept.gradient, kept.parameter->shape);
  }
}

void Telemetry::allocate() {
  if (every_ == 0) return;
  arena_.allocate(ctx_);
  ctx_.scratch.reserve(scratch_bytes());
}

int64_t Telemetry::scratch_bytes() const {
  if (every_ == 0) return 0;
  int64_t bytes = whole_scratch_bytes();
  for (const RowStep& row : optimizer_.last_steps()) {
    const Parameter& p = *row.parameter;
    const Shape block = p.is_matrix() ? Shape{p.shape[0] / p.matrices, p.shape[1]} : p.shape;
    if (!is_spectral(row.norm))
      bytes = std::max(bytes, norm_scratch_bytes(ctx_, row.norm, block, DType::f32));
    if (!has_band(p, row.norm)) continue;
    bytes = std::max(bytes, std::min(block[0], block[1]) <= kExactSide
                                ? svd_scratch_bytes(ctx_, block[0], block[1])
                                : std::max(lanczos_scratch_bytes(block[0], block[1]),
                                           nuclear_norm_scratch_bytes(ctx_, block[0], block[1])));
  }
  return bytes;
}

void Telemetry::keep() {
  std::vector<Smooth> list;
  for (const Kept& kept : kept_) {
    for (const MasterRows& m : kept.parameter->masters)
      list.push_back({.u = kept.change.slice(m.first, m.values.shape[0]), .g = m.values});
    list.push_back({.u = kept.gradient, .g = kept.parameter->grad});
  }
  smooth(ctx_, list);
}

void Telemetry::gather_changes(const Step& step) {
  if (ctx_.comm->alone()) return;
  std::vector<Tensor> changes;
  for (const Kept& kept : kept_) changes.push_back(kept.change);
  step.gather(changes);
}

StepNorms Telemetry::measure(const Step& step) {
  expect(every_ > 0, "telemetry: made without memory");
  StepNorms found{.step = step.t, .loss = step.gradients()};
  keep();
  gather_changes(step);
  step.update();
  const std::vector<RowStep> rows = optimizer_.last_steps();
  for (size_t i = 0; i < rows.size(); ++i) found.tensors.push_back(all_but_sharpness(kept_[i], rows[i]));
  std::vector<ApplyUpdate> changes;  // dW = W' - W: all of W is taken off twice, and W' put on
  for (const Kept& kept : kept_)
    for (const MasterRows& m : kept.parameter->masters)
      changes.push_back(
          {.w = kept.change.slice(m.first, m.values.shape[0]), .u = m.values, .step = -1, .decay = 2});
  apply_update(ctx_, changes);
  gather_changes(step);
  std::vector<double> along(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) along[i] = dot(ctx_, kept_[i].gradient, kept_[i].change);

  found.loss_after = step.gradients();
  double curvature = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const Parameter& p = *kept_[i].parameter;
    const double length = norm_of(rows[i].norm, kept_[i].change, p);
    const double bent = dot(ctx_, p.grad, kept_[i].change) - along[i];
    found.tensors[i].sharpness = bent / (length * length);
    found.predicted += along[i];
    found.length = larger(rows[i].sensitivity * length, found.length);
    curvature += bent;
  }
  found.sharpness = curvature / (found.length * found.length);
  found.bound = found.loss + found.predicted + curvature / 2;
  return found;
}

/// Right after the step: `kept` is W and G, Parameter::grad is u.
TensorNorms Telemetry::all_but_sharpness(const Kept& kept, const RowStep& row) {
  const Parameter& p = *kept.parameter;
  TensorNorms found{.name = p.name, .role = p.role, .norm = row.norm};
  found.weight = norm_of(row.norm, kept.change, p);
  found.gradient_dual = dual_norm_of(row.norm, kept.gradient, p);
  if (has_band(p, row.norm)) {
    for (int i = 0; i < p.matrices; ++i) {
      const Tensor block = block_of(p.grad, i, p);
      const double factor = is_spectral(row.norm) ? factor_of(row.norm, block, p) : 1;
      SingularBand band = band_of(block);
      band = {band.low / factor, band.high / factor};
      if (!found.band) found.band = band;
      found.band->low = -larger(-band.low, -found.band->low);
      found.band->high = larger(band.high, found.band->high);
    }
  }
  found.update = is_spectral(row.norm) ? found.band->high : norm_of(row.norm, p.grad, p);
  found.alignment = dot(ctx_, kept.gradient, p.grad) / (found.gradient_dual * found.update);
  found.step = row.step * found.update;
  found.s_step = row.sensitivity * found.step;
  return found;
}

double Telemetry::norm_of(const Norm& kind, const Tensor& tensor, const Parameter& p) {
  if (!p.is_matrix()) return norm(ctx_, kind, tensor);
  double value = 0;
  for (int i = 0; i < p.matrices; ++i) {
    const Tensor block = block_of(tensor, i, p);
    value = larger(is_spectral(kind) ? band_of(block).high / factor_of(kind, block, p)
                                     : norm(ctx_, kind, block, p.stored_transposed()),
                   value);
  }
  return value;
}

double Telemetry::dual_norm_of(const Norm& kind, const Tensor& tensor, const Parameter& p) {
  if (!p.is_matrix()) return dual_norm(ctx_, kind, tensor);
  double sum = 0;
  for (int i = 0; i < p.matrices; ++i) {
    const Tensor block = block_of(tensor, i, p);
    sum += is_spectral(kind) && !small(block) ? factor_of(kind, block, p) * nuclear_norm(ctx_, block)
                                              : dual_norm(ctx_, kind, block, p.stored_transposed());
  }
  return sum;
}

SingularBand Telemetry::band_of(const Tensor& block) {
  if (!small(block)) return lanczos_band(ctx_, block);
  std::vector<double> values(static_cast<size_t>(std::min(block.rows(), block.cols())));
  singular_values(ctx_, block, values);
  return {.low = values.back(), .high = values.front()};
}
