#include "optim/norm.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <string_view>
#include <vector>

#include "model/kernels/reduce.h"
#include "optim/norm_family.h"
#include "optim/svd.h"
#include "optim/update.h"

namespace {
/// One norm: how it is computed, and norm_scale() for W (out, in).
struct NormRow {
  NormKind kind;
  const char* name;
  const NormFamily& (*family)();
  double (*scale)(double out, double in);
};

double one(double, double) {
  return 1;
}
// In the order of NormKind.
constexpr NormRow kNorms[] = {
    {NormKind::frobenius, "frobenius", whole_norms, one},
    {NormKind::rms, "rms", whole_norms, [](double out, double in) { return std::sqrt(out * in); }},
    {NormKind::l1_linf, "l1-linf", entry_norms, one},
    {NormKind::scaled_l1_linf, "scaled-l1-linf", entry_norms, [](double, double in) { return 1 / in; }},
    {NormKind::l2_l2, "l2-l2", spectral_norms, one},
    {NormKind::rms_rms, "rms-rms", spectral_norms, [](double out, double in) { return std::sqrt(out / in); }},
    {NormKind::nuclear, "nuclear", nuclear_norms, one},
    {NormKind::spectral_keller, "spectral-keller", spectral_norms,
     [](double out, double in) { return std::sqrt(std::max(1.0, out / in)); }},
    {NormKind::spectral_moonlight, "spectral-moonlight", spectral_norms,
     [](double out, double in) { return 0.2 * std::sqrt(std::max(out, in)); }},
    {NormKind::l1_lp, "l1-lp", norms_of_columns, one},
    {NormKind::l1_rms, "l1-rms", norms_of_columns, [](double out, double) { return std::sqrt(out); }},
    {NormKind::lp_linf, "lp-linf", norms_of_rows, one},
    {NormKind::rms_linf, "rms-linf", norms_of_rows, [](double, double in) { return 1 / std::sqrt(in); }},
};
constexpr double kInfinity = std::numeric_limits<double>::infinity();

const NormRow& row_of(const Norm& norm) {
  return kNorms[static_cast<size_t>(norm.kind)];
}
const NormFamily& family_of(const Norm& norm) {
  return row_of(norm).family();
}

const PolarMethod& given_or_svd(const PolarMethod* method) {
  static const PolarMethod svd = polar_method("svd");
  return method != nullptr ? *method : svd;
}

/// (batch, rows, cols) of any legal tensor.
Tensor as_batch(const Tensor& x) {
  if (x.shape.rank() == 3) return x;
  if (x.shape.rank() == 2) return x.view({1, x.shape[0], x.shape[1]});
  expect(x.shape.rank() == 1, "norm: need a vector, a matrix or a batch of matrices");
  return x.view({1, x.shape[0], 1});
}

double scale_of(const NormInput& in) {
  const int64_t rows = in.x.shape[1], cols = in.x.shape[2];
  return in.transposed ? norm_scale(in.norm, cols, rows) : norm_scale(in.norm, rows, cols);
}

void values_of(Context& ctx, const NormInput& in, bool dual, std::span<double> values) {
  expect(static_cast<int64_t>(values.size()) == in.x.shape[0], "norms: need one value for each matrix");
  if (values.empty()) return;
  family_of(in.norm).values(ctx, in, dual, values);
  const double scale = scale_of(in);
  for (double& value : values) value = dual ? value * scale : value / scale;
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

double larger(double a, double b) {
  return a > b || std::isnan(a) ? a : b;
}

void combine_singular_values(Context& ctx, const Tensor& x, bool sum, std::span<double> values) {
  std::vector<double> list(static_cast<size_t>(std::min(x.shape[1], x.shape[2])));
  for (size_t i = 0; i < values.size(); ++i) {
    singular_values(ctx, x[static_cast<int64_t>(i)], list);
    combine(list.data(), static_cast<int64_t>(list.size()), sum, values.subspan(i, 1));
  }
}

void copy_scaled(Context& ctx, const Tensor& y, const Tensor& x, double scale) {
  if (y.data != x.data || scale != 1) smooth(ctx, {.u = y, .g = x, .gain = scale});
}

std::span<const char* const> norm_names() {
  static constexpr auto kNames = [] {
    std::array<const char*, std::size(kNorms)> names{};
    for (size_t i = 0; i < names.size(); ++i) names[i] = kNorms[i].name;
    return names;
  }();
  return kNames;
}

std::string norm_name(const Norm& norm) {
  const auto number = [&] { return std::isinf(norm.p) ? std::string("inf") : fmt::format("{}", norm.p); };
  if (norm.kind == NormKind::l1_lp) return fmt::format("l1-l{}", number());
  if (norm.kind == NormKind::lp_linf) return fmt::format("l{}-linf", number());
  return row_of(norm).name;
}

std::optional<Norm> find_norm(const std::string& name) {
  if (name == "l2") return Norm{NormKind::frobenius};
  if (name == "linf") return Norm{NormKind::l1_linf};
  if (name == "spectral") return Norm{NormKind::l2_l2};
  for (const NormRow& row : kNorms)
    if (name == row.name && row.kind != NormKind::l1_lp && row.kind != NormKind::lp_linf)
      return Norm{row.kind};
  const size_t dash = name.find('-');
  if (dash == std::string::npos) return std::nullopt;
  const std::optional<double> from = exponent_of(std::string_view(name).substr(0, dash)),
                              to = exponent_of(std::string_view(name).substr(dash + 1));
  if (from && to && *from == 1) return Norm{NormKind::l1_lp, *to};
  if (from && to && std::isinf(*to)) return Norm{NormKind::lp_linf, *from};
  return std::nullopt;
}

bool is_spectral(const Norm& norm) {
  return row_of(norm).family == spectral_norms;
}

bool has_singular_values(const Norm& norm) {
  return is_spectral(norm) || row_of(norm).family == nuclear_norms;
}

bool rows_apart(const Norm& norm, bool transposed) {
  switch (norm.kind) {
    case NormKind::l1_linf:
      return true;
    case NormKind::scaled_l1_linf:  // its factor counts the paper's columns
    case NormKind::lp_linf:
    case NormKind::rms_linf:
      return !transposed;
    case NormKind::l1_lp:
    case NormKind::l1_rms:
      return transposed;
    default:
      return false;
  }
}

bool moves(const Norm& norm) {
  return family_of(norm).moves(norm);
}

Lengths lengths_of(const Norm& norm, bool transposed) {
  return family_of(norm).lengths(norm, transposed);
}

int64_t count_of(Lengths lengths, const Shape& shape) {
  if (lengths == Lengths::none) return 0;
  return lengths == Lengths::whole ? 1 : shape[1];
}

void measure_lengths(Context& ctx, Lengths lengths, const Tensor& to, const Tensor& x) {
  if (lengths == Lengths::whole) return row_norms(ctx, {.norms = to, .x = x.view({1, x.size()})});
  if (lengths == Lengths::columns) col_norms(ctx, {.norms = to, .x = x});
}

bool on_host(const Norm& norm, const PolarMethod* polar) {
  return family_of(norm).on_host(given_or_svd(polar));
}

double norm_scale(const Norm& norm, int64_t out, int64_t in) {
  return row_of(norm).scale(static_cast<double>(out), static_cast<double>(in));
}

void norms(Context& ctx, const Norm& kind, const Tensor& w, bool transposed, std::span<double> values) {
  values_of(ctx, {kind, as_batch(w), transposed}, /*dual=*/false, values);
}

void dual_norms(Context& ctx, const Norm& kind, const Tensor& g, bool transposed, std::span<double> values) {
  values_of(ctx, {kind, as_batch(g), transposed}, /*dual=*/true, values);
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
  if (args.out || !args.into.w) expect_shape(args.out, args.g.shape, "dualize: out");
  const NormInput in{args.norm, as_batch(args.g), args.transposed};
  expect(!args.into.w || (moves(args.norm) && in.x.shape[0] == 1), "dualize: this cannot move a weight");
  expect(
      !args.lengths || args.lengths.size() == count_of(lengths_of(args.norm, args.transposed), args.g.shape),
      "dualize: these are not the lengths of this gradient");
  if (in.x.size() == 0) return;
  const DualOutput to{.out = args.out ? as_batch(args.out) : Tensor{},
                      .scale = args.radius * scale_of(in),
                      .into = args.into,
                      .lengths = args.lengths};
  family_of(args.norm).dualize(ctx, in, to, given_or_svd(args.polar));
}

int64_t norm_scratch_bytes(const Context& ctx, const Norm& kind, const Shape& shape, DType dtype,
                           const PolarMethod* polar) {
  const int64_t batch = shape.rank() == 3 ? shape[0] : 1;
  const int64_t rows = shape.rank() == 1 ? shape[0] : shape[shape.rank() - 2];
  const int64_t cols = shape.rank() == 1 ? 1 : shape[shape.rank() - 1];
  return family_of(kind).scratch_bytes(ctx, {batch, rows, cols}, dtype, given_or_svd(polar));
}
