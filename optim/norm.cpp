#include "optim/norm.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <string_view>
#include <vector>

#include "model/kernels/reduce.h"
#include "model/kernels/simd.h"
#include "optim/lines.h"
#include "optim/svd.h"
#include "optim/update.h"

namespace {
/// What a norm is made of, before any factor of out and in.
enum class Base : uint8_t { whole, entries, spectral, nuclear, columns, rows };

constexpr const char* kNames[] = {"frobenius", "rms",     "l1-linf",         "scaled-l1-linf",     "l2-l2",
                                  "rms-rms",   "nuclear", "spectral-keller", "spectral-moonlight", "l1-lp",
                                  "l1-rms",    "lp-linf", "rms-linf"};
constexpr double kInfinity = std::numeric_limits<double>::infinity();

const PolarMethod& given_or_svd(const PolarMethod* method) {
  static const PolarMethod svd = polar_method("svd");
  return method != nullptr ? *method : svd;
}

Base base_of(const Norm& norm) {
  switch (norm.kind) {
    case NormKind::frobenius:
    case NormKind::rms:
      return Base::whole;
    case NormKind::l1_linf:
    case NormKind::scaled_l1_linf:
      return Base::entries;
    case NormKind::l2_l2:
    case NormKind::rms_rms:
    case NormKind::spectral_keller:
    case NormKind::spectral_moonlight:
      return Base::spectral;
    case NormKind::nuclear:
      return Base::nuclear;
    case NormKind::l1_lp:
    case NormKind::l1_rms:
      return Base::columns;
    case NormKind::lp_linf:
    case NormKind::rms_linf:
      return Base::rows;
  }
  return Base::whole;
}

/// q with 1/p + 1/q = 1.
double conjugate(double p) {
  if (p == 1) return kInfinity;
  return std::isinf(p) ? 1 : p / (p - 1);
}

/// The exponent of the norms of single rows or columns whose sum is the dual norm; the norm is the largest of
/// their norms with the conjugate exponent.
double dual_exponent(const Norm& norm) {
  return norm.kind == NormKind::l1_lp ? conjugate(norm.p) : norm.p;
}

/// max that lets a NaN through.
double larger(double a, double b) {
  return a > b || std::isnan(a) ? a : b;
}

/// (batch, rows, cols) of any legal tensor.
Tensor as_batch(const Tensor& x) {
  if (x.shape.rank() == 3) return x;
  if (x.shape.rank() == 2) return x.view({1, x.shape[0], x.shape[1]});
  expect(x.shape.rank() == 1, "norm: need a vector, a matrix or a batch of matrices");
  return x.view({1, x.shape[0], 1});
}

double scale_of(const Norm& kind, const Tensor& batch, bool transposed) {
  const int64_t rows = batch.shape[1], cols = batch.shape[2];
  return transposed ? norm_scale(kind, cols, rows) : norm_scale(kind, rows, cols);
}

/// The paper's columns and rows are the storage's rows and columns when it is transposed.
Lines lines_in_storage(Base base, bool transposed) {
  return (base == Base::rows) != transposed ? Lines::rows : Lines::columns;
}

int64_t count_of(const Tensor& batch, Lines lines) {
  return batch.shape[0] * (lines == Lines::rows ? batch.shape[1] : batch.shape[2]);
}

/// x with every matrix of the batch as one row.
Tensor flat(const Tensor& batch) {
  return batch.view({batch.shape[0], batch.shape[1] * batch.shape[2]});
}
/// x with the rows of all matrices below each other.
Tensor all_rows(const Tensor& batch) {
  return batch.view({batch.shape[0] * batch.shape[1], batch.shape[2]});
}

/// The dtype of norms and scales of x.
DType dtype_of_norms(DType x) {
  return x == DType::f64 ? DType::f64 : DType::f32;
}

/// values[i] = the largest, or the sum, of the i-th of equal parts of `list`.
template <typename T>
void combine(const T* list, int64_t count, bool sum, std::span<double> values) {
  const int64_t part = count / static_cast<int64_t>(values.size());
  for (double& value : values) {
    value = 0;
    for (int64_t i = 0; i < part; ++i, ++list) value = sum ? value + *list : larger(*list, value);
  }
}

/// Euclidean norms of lines, by the fastest way there is.
void euclidean_norms(Context& ctx, const Tensor& norms, const Tensor& x, Lines lines) {
  if (lines == Lines::rows) return row_norms(ctx, {.norms = norms, .x = all_rows(x)});
  const int64_t batch = x.shape[0], cols = x.shape[2];
  for (int64_t i = 0; i < batch; ++i) col_norms(ctx, {.norms = norms.view({batch, cols})[i], .x = x[i]});
}

/// y = factor x / ||x||_2 for every line.
void unit_lines(Context& ctx, const Tensor& y, const Tensor& x, Lines lines, double factor) {
  Scratch::Frame frame(ctx.scratch);
  const Tensor norms = frame.tensor({count_of(x, lines)}, dtype_of_norms(x.dtype));
  euclidean_norms(ctx, norms, x, lines);
  if (lines == Lines::rows)
    return scale_rows(
        ctx, {.y = all_rows(y), .x = all_rows(x), .scales = norms, .factor = factor, .divide = true});
  const int64_t batch = x.shape[0], cols = x.shape[2];
  for (int64_t i = 0; i < batch; ++i)
    scale_cols(
        ctx,
        {.y = y[i], .x = x[i], .scales = norms.view({batch, cols})[i], .factor = factor, .divide = true});
}

/// The largest, or the sum, of the q-norms of the lines of each matrix.
void values_of_lines(Context& ctx, const Tensor& x, Lines lines, double q, bool sum,
                     std::span<double> values) {
  Scratch::Frame frame(ctx.scratch);
  const Tensor norms = frame.tensor({count_of(x, lines)}, dtype_of_norms(x.dtype));
  if (q == 2)
    euclidean_norms(ctx, norms, x, lines);
  else
    line_norms(ctx, {.norms = norms, .x = x, .lines = lines, .q = q});
  const OnHost here(ctx, norms);
  for_real_type(norms.dtype, [&]<typename T>(T) { combine(reals_of<T>(*here), norms.size(), sum, values); });
}

/// ||x||_F of each matrix.
void values_of_wholes(Context& ctx, const Tensor& x, std::span<double> values) {
  std::vector<Tensor> matrices;
  for (int64_t i = 0; i < x.shape[0]; ++i) matrices.push_back(x[i]);
  Scratch::Frame frame(ctx.scratch);
  const Tensor sums = frame.tensor({x.shape[0]}, DType::f64);
  sums_of_squares(ctx, {.sums = sums, .tensors = matrices});
  const OnHost here(ctx, sums);
  for (size_t i = 0; i < values.size(); ++i) values[i] = std::sqrt(here->f64()[i]);
}

/// The largest, or the sum, of the singular values of one matrix.
double value_of_singular(Context& ctx, const Tensor& x, bool sum) {
  std::vector<double> list(static_cast<size_t>(std::min(x.rows(), x.cols())));
  singular_values(ctx, x, list);
  double value = 0;
  combine(list.data(), static_cast<int64_t>(list.size()), sum, {&value, 1});
  return value;
}

void base_values(Context& ctx, const Norm& kind, const Tensor& x, bool transposed, bool dual,
                 std::span<double> values) {
  const Base base = base_of(kind);
  const double q = dual ? dual_exponent(kind) : conjugate(dual_exponent(kind));
  switch (base) {
    case Base::whole:
      return values_of_wholes(ctx, x, values);
    case Base::entries:
      for (size_t i = 0; i < values.size(); ++i) {
        const Tensor matrix = x[static_cast<int64_t>(i)];
        values[i] = dual ? sum_abs(ctx, matrix) : max_abs(ctx, matrix);
      }
      return;
    case Base::spectral:
    case Base::nuclear:
      for (size_t i = 0; i < values.size(); ++i)
        values[i] = value_of_singular(ctx, x[static_cast<int64_t>(i)], dual == (base == Base::spectral));
      return;
    case Base::columns:
    case Base::rows:
      return values_of_lines(ctx, x, lines_in_storage(base, transposed), q, /*sum=*/dual, values);
  }
}

void values_of(Context& ctx, const Norm& kind, const Tensor& x, bool transposed, bool dual,
               std::span<double> values) {
  const Tensor batch = as_batch(x);
  expect(static_cast<int64_t>(values.size()) == batch.shape[0], "norms: need one value for each matrix");
  if (values.empty()) return;
  base_values(ctx, kind, batch, transposed, dual, values);
  const double scale = scale_of(kind, batch, transposed);
  for (double& value : values) value = dual ? value * scale : value / scale;
}

/// y = scale x.
void copy_scaled(Context& ctx, const Tensor& y, const Tensor& x, double scale) {
  if (y.data != x.data || scale != 1) smooth(ctx, {.u = y, .g = x, .gain = scale});
}

/// p of "l1.5", "linf"; nothing unless it is in [1, inf].
std::optional<double> exponent_of(std::string_view text) {
  if (text.empty() || text[0] != 'l') return std::nullopt;
  text.remove_prefix(1);
  if (text == "inf") return kInfinity;
  double p = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), p);
  const bool ok = error == std::errc() && end == text.data() + text.size() && p >= 1 && std::isfinite(p);
  return ok ? std::optional(p) : std::nullopt;
}
}  // namespace

std::span<const char* const> norm_names() {
  return kNames;
}

std::string norm_name(const Norm& norm) {
  const auto number = [&] { return std::isinf(norm.p) ? std::string("inf") : fmt::format("{}", norm.p); };
  if (norm.kind == NormKind::l1_lp) return fmt::format("l1-l{}", number());
  if (norm.kind == NormKind::lp_linf) return fmt::format("l{}-linf", number());
  return kNames[static_cast<size_t>(norm.kind)];
}

std::optional<Norm> find_norm(const std::string& name) {
  for (size_t i = 0; i < std::size(kNames); ++i) {
    const auto kind = static_cast<NormKind>(i);
    if (name == kNames[i] && kind != NormKind::l1_lp && kind != NormKind::lp_linf) return Norm{kind};
  }
  const size_t dash = name.find('-');
  if (dash == std::string::npos) return std::nullopt;
  const std::optional<double> from = exponent_of(std::string_view(name).substr(0, dash)),
                              to = exponent_of(std::string_view(name).substr(dash + 1));
  if (from && to && *from == 1) return Norm{NormKind::l1_lp, *to};
  if (from && to && std::isinf(*to)) return Norm{NormKind::lp_linf, *from};
  return std::nullopt;
}

bool is_spectral(const Norm& norm) {
  return base_of(norm) == Base::spectral;
}

bool on_host(const Norm& norm, const PolarMethod* polar) {
  return norm.kind == NormKind::nuclear || (is_spectral(norm) && given_or_svd(polar).on_host());
}

double norm_scale(const Norm& norm, int64_t out, int64_t in) {
  const double o = static_cast<double>(out), i = static_cast<double>(in);
  switch (norm.kind) {
    case NormKind::rms:
      return std::sqrt(o * i);
    case NormKind::scaled_l1_linf:
      return 1 / i;
    case NormKind::rms_rms:
      return std::sqrt(o / i);
    case NormKind::spectral_keller:
      return std::sqrt(std::max(1.0, o / i));
    case NormKind::spectral_moonlight:
      return 0.2 * std::sqrt(std::max(o, i));
    case NormKind::l1_rms:
      return std::sqrt(o);
    case NormKind::rms_linf:
      return 1 / std::sqrt(i);
    default:
      return 1;
  }
}

void norms(Context& ctx, const Norm& kind, const Tensor& w, bool transposed, std::span<double> values) {
  values_of(ctx, kind, w, transposed, /*dual=*/false, values);
}

void dual_norms(Context& ctx, const Norm& kind, const Tensor& g, bool transposed, std::span<double> values) {
  values_of(ctx, kind, g, transposed, /*dual=*/true, values);
}

double norm(Context& ctx, const Norm& kind, const Tensor& w, bool transposed) {
  double value = 0;
  norms(ctx, kind, w, transposed, {&value, 1});
  return value;
}

double dual_norm(Context& ctx, const Norm& kind, const Tensor& g, bool transposed) {
  double value = 0;
  dual_norms(ctx, kind, g, transposed, {&value, 1});
  return value;
}

void dualize(Context& ctx, const Dualize& args) {
  expect_shape(args.out, args.g.shape, "dualize: out");
  const Tensor out = as_batch(args.out), g = as_batch(args.g);
  const double scale = scale_of(args.norm, g, args.transposed), q = dual_exponent(args.norm);
  const Base base = base_of(args.norm);
  switch (base) {
    case Base::whole:
      return unit_lines(ctx, flat(out).view({1, g.shape[0], g[0].size()}),
                        flat(g).view({1, g.shape[0], g[0].size()}), Lines::rows, scale);
    case Base::entries:
      sign(ctx, {.u = out, .x = g});
      return copy_scaled(ctx, out, out, scale);
    case Base::spectral:
      copy_scaled(ctx, out, g, 1);
      polar(ctx, {.x = out, .method = given_or_svd(args.polar)});
      return copy_scaled(ctx, out, out, scale);
    case Base::nuclear:
      copy_scaled(ctx, out, g, 1);
      for (int64_t i = 0; i < out.shape[0]; ++i) svd_polar(ctx, out[i], {.rank = 1});
      return;
    case Base::columns:
    case Base::rows:
      const Lines lines = lines_in_storage(base, args.transposed);
      if (q == 2) return unit_lines(ctx, out, g, lines, scale);
      return line_duals(ctx, {.y = out, .x = g, .lines = lines, .q = q, .factor = scale});
  }
}

int64_t norm_scratch_bytes(const Context& ctx, const Norm& kind, const Shape& shape, DType dtype,
                           const PolarMethod* polar) {
  const int64_t batch = shape.rank() == 3 ? shape[0] : 1;
  const int64_t rows = shape.rank() == 1 ? shape[0] : shape[shape.rank() - 2];
  const int64_t cols = shape.rank() == 1 ? 1 : shape[shape.rank() - 1];
  const int64_t each = dtype_bytes(dtype_of_norms(dtype));
  const int64_t of_rows = each * batch * rows + row_norms_scratch_bytes(batch * rows, cols);
  const int64_t of_columns = each * batch * cols + col_norms_scratch_bytes(rows, cols);
  switch (base_of(kind)) {
    case Base::nuclear:
      return svd_scratch_bytes(ctx, rows, cols);
    case Base::spectral:
      return std::max(svd_scratch_bytes(ctx, rows, cols),
                      polar_scratch_bytes(ctx, {batch, rows, cols}, dtype, given_or_svd(polar)));
    case Base::columns:
    case Base::rows:
      return std::max(of_rows, of_columns);  // which of the two depends on `transposed`
    case Base::whole: {
      const std::vector<Tensor> matrices(static_cast<size_t>(batch), Tensor{nullptr, dtype, {rows, cols}});
      return std::max(each * batch + row_norms_scratch_bytes(batch, rows * cols),
                      8 * batch + sums_of_squares_scratch_bytes(matrices));
    }
    case Base::entries:
      return whole_scratch_bytes();
  }
  return 0;
}
