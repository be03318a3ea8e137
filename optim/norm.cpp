#include "optim/norm.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "model/kernels/reduce.h"
#include "optim/svd.h"
#include "optim/update.h"

namespace {
/// What a norm is made of, before any factor of out and in.
enum class Base : uint8_t { whole, entries, spectral, columns, rows, column_sums, row_sums };

constexpr const char* kNames[] = {"frobenius", "rms",     "l1-linf",         "scaled-l1-linf",
                                  "l2-l2",     "rms-rms", "spectral-keller", "spectral-moonlight",
                                  "l1-lp",     "l1-rms",  "lp-linf",         "rms-linf"};
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
    case NormKind::l1_lp:
      return norm.p == 1 ? Base::column_sums : Base::columns;
    case NormKind::l1_rms:
      return Base::columns;
    case NormKind::lp_linf:
      return norm.p == kInfinity ? Base::row_sums : Base::rows;
    case NormKind::rms_linf:
      return Base::rows;
  }
  return Base::whole;
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
Base in_storage(Base base, bool transposed) {
  if (!transposed) return base;
  switch (base) {
    case Base::columns:
      return Base::rows;
    case Base::rows:
      return Base::columns;
    case Base::column_sums:
      return Base::row_sums;
    case Base::row_sums:
      return Base::column_sums;
    default:
      return base;
  }
}

/// Over a list of values: their largest for norms, their sum for dual norms.
template <typename Values>
double combine(const Values& values, bool dual) {
  double result = 0;
  for (const auto value : values) result = dual ? result + value : larger(static_cast<double>(value), result);
  return result;
}

/// Euclidean norms of the rows or columns of a matrix.
double lines(Context& ctx, const Tensor& x, bool by_rows, bool dual) {
  Scratch::Frame frame(ctx.scratch);
  const Tensor values = frame.tensor({by_rows ? x.rows() : x.cols()});
  by_rows ? row_norms(ctx, {.norms = values, .x = x}) : col_norms(ctx, {.norms = values, .x = x});
  return combine(OnHost(ctx, values)->floats(), dual);
}

/// Per row or column the sum |x| (norm) or the largest |x| (dual norm). Rarely used: not threaded, on the
/// host.
double line_sums(Context& ctx, const Tensor& there, bool by_rows, bool dual) {
  const OnHost here(ctx, there);
  const Tensor& x = *here;
  const int64_t count = by_rows ? x.rows() : x.cols(), length = x.size() / std::max<int64_t>(count, 1);
  double result = 0;
  for (int64_t line = 0; line < count; ++line) {
    double value = 0;
    for (int64_t i = 0; i < length; ++i) {
      const double entry = std::fabs(x.f32()[by_rows ? line * x.cols() + i : i * x.cols() + line]);
      value = dual ? larger(entry, value) : value + entry;
    }
    result = dual ? result + value : larger(value, result);
  }
  return result;
}

/// One matrix, without the factor of out and in.
double base_value(Context& ctx, Base base, const Tensor& x, bool dual) {
  switch (base) {
    case Base::whole:
      return std::sqrt(sum_of_squares(ctx, x));
    case Base::entries:
      return dual ? sum_abs(ctx, x) : static_cast<double>(max_abs(ctx, x));
    case Base::spectral: {
      std::vector<double> values(static_cast<size_t>(std::min(x.rows(), x.cols())));
      singular_values(ctx, x, values);
      return combine(values, dual);
    }
    case Base::columns:
    case Base::rows:
      return lines(ctx, x, base == Base::rows, dual);
    case Base::column_sums:
    case Base::row_sums:
      return line_sums(ctx, x, base == Base::row_sums, dual);
  }
  return 0;
}

void values_of(Context& ctx, const Norm& kind, const Tensor& x, bool transposed, bool dual,
               std::span<double> values) {
  const Tensor batch = as_batch(x);
  expect(static_cast<int64_t>(values.size()) == batch.shape[0], "norms: need one value for each matrix");
  const Base base = in_storage(base_of(kind), transposed);
  const double scale = scale_of(kind, batch, transposed);
  for (int64_t i = 0; i < batch.shape[0]; ++i) {
    const double value = base_value(ctx, base, batch[i], dual);
    values[static_cast<size_t>(i)] = dual ? value * scale : value / scale;
  }
}

/// One-hot dual vectors of l1-l1 and linf-linf: per line, `scale` sign(g) where |g| is largest. A NaN takes
/// its line. On the host.
void dualize_line_sums(Context& ctx, const Tensor& out_there, const Tensor& g_there, bool by_rows) {
  const OnHost g_here(ctx, g_there);
  OnHost out_here(ctx, out_there, /*load=*/false);
  const Tensor &g = *g_here, &out = *out_here;
  const int64_t count = by_rows ? g.rows() : g.cols(), length = g.size() / std::max<int64_t>(count, 1);
  for (int64_t line = 0; line < count; ++line) {
    const auto at = [&](int64_t i) { return by_rows ? line * g.cols() + i : i * g.cols() + line; };
    int64_t best = 0;
    for (int64_t i = 1; i < length; ++i) {
      const float entry = g.f32()[at(i)], so_far = g.f32()[at(best)];
      if (!std::isnan(so_far) && !(std::fabs(entry) <= std::fabs(so_far)))
        best = i;  // a NaN is larger than all
    }
    const float value = g.f32()[at(best)];
    for (int64_t i = 0; i < length; ++i) out.f32()[at(i)] = std::isnan(value) ? value : 0.0f;
    out.f32()[at(best)] = value > 0 ? 1.0f : (value < 0 ? -1.0f : value);
  }
  out_here.store();
}

/// y = scale x.
void copy_scaled(Context& ctx, const Tensor& y, const Tensor& x, double scale) {
  if (y.data != x.data || scale != 1) smooth(ctx, {.u = y, .g = x, .gain = static_cast<float>(scale)});
}

/// y = scale x / ||x||_2 for every row of a matrix.
void unit_rows(Context& ctx, const Tensor& y, const Tensor& x, double scale) {
  Scratch::Frame frame(ctx.scratch);
  const Tensor norms = frame.tensor({x.rows()});
  row_norms(ctx, {.norms = norms, .x = x});
  scale_rows(ctx, {.y = y, .x = x, .scales = norms, .factor = static_cast<float>(scale), .divide = true});
}

/// y = scale x / ||x||_2 for every column of a matrix.
void unit_columns(Context& ctx, const Tensor& y, const Tensor& x, double scale) {
  Scratch::Frame frame(ctx.scratch);
  const Tensor norms = frame.tensor({x.cols()});
  col_norms(ctx, {.norms = norms, .x = x});
  scale_cols(ctx, {.y = y, .x = x, .scales = norms, .factor = static_cast<float>(scale), .divide = true});
}
}  // namespace

std::span<const char* const> norm_names() {
  return kNames;
}

std::string norm_name(const Norm& norm) {
  const auto number = [&] { return std::isinf(norm.p) ? std::string("inf") : fmt::format("{:g}", norm.p); };
  if (norm.kind == NormKind::l1_lp) return fmt::format("l1-l{}", number());
  if (norm.kind == NormKind::lp_linf) return fmt::format("l{}-linf", number());
  return kNames[static_cast<size_t>(norm.kind)];
}

std::optional<Norm> find_norm(const std::string& name) {
  for (size_t i = 0; i < std::size(kNames); ++i) {
    const auto kind = static_cast<NormKind>(i);
    if (name == kNames[i] && kind != NormKind::l1_lp && kind != NormKind::lp_linf) return Norm{kind};
  }
  for (const Norm norm : {Norm{NormKind::l1_lp, 1}, Norm{NormKind::l1_lp, 2}, Norm{NormKind::lp_linf, 2},
                          Norm{NormKind::lp_linf, kInfinity}})
    if (name == norm_name(norm)) return norm;
  return std::nullopt;
}

bool is_spectral(const Norm& norm) {
  return base_of(norm) == Base::spectral;
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
  const double scale = scale_of(args.norm, g, args.transposed);
  const int64_t batch = g.shape[0], rows = g.shape[1], cols = g.shape[2];
  const Base base = in_storage(base_of(args.norm), args.transposed);
  switch (base) {
    case Base::whole:
      return unit_rows(ctx, out.view({batch, rows * cols}), g.view({batch, rows * cols}), scale);
    case Base::entries:
      sign(ctx, {.u = out, .x = g});
      return copy_scaled(ctx, out, out, scale);
    case Base::spectral:
      copy_scaled(ctx, out, g, 1);
      polar(ctx, {.x = out, .method = given_or_svd(args.polar)});
      return copy_scaled(ctx, out, out, scale);
    case Base::rows:
      return unit_rows(ctx, out.view({batch * rows, cols}), g.view({batch * rows, cols}), scale);
    case Base::columns:
      for (int64_t i = 0; i < batch; ++i) unit_columns(ctx, out[i], g[i], scale);
      return;
    case Base::column_sums:
    case Base::row_sums:
      for (int64_t i = 0; i < batch; ++i) dualize_line_sums(ctx, out[i], g[i], base == Base::row_sums);
      return copy_scaled(ctx, out, out, scale);
  }
}

int64_t norm_scratch_bytes(const Context& ctx, const Norm& kind, const Shape& shape,
                           const PolarMethod* polar) {
  const int64_t batch = shape.rank() == 3 ? shape[0] : 1;
  const int64_t rows = shape.rank() == 1 ? shape[0] : shape[shape.rank() - 2];
  const int64_t cols = shape.rank() == 1 ? 1 : shape[shape.rank() - 1];
  const int64_t of_rows = 4 * batch * rows + row_norms_scratch_bytes(batch * rows, cols);
  const int64_t of_columns = 4 * cols + col_norms_scratch_bytes(rows, cols);
  switch (base_of(kind)) {
    case Base::spectral:
      return std::max(svd_scratch_bytes(ctx, rows, cols),
                      polar_scratch_bytes(ctx, {batch, rows, cols}, DType::f32, given_or_svd(polar)));
    case Base::columns:
    case Base::rows:
      return std::max(of_rows, of_columns);  // which of the two depends on `transposed`
    case Base::whole:
      return std::max(4 * batch + row_norms_scratch_bytes(batch, rows * cols), whole_scratch_bytes());
    default:
      return whole_scratch_bytes();
  }
}
