// rownorm, colnorm and steepest: dual vectors of a norm that the user names.
//
// clang-format off
//   colnorm   norm=l1-rms    u_j = sqrt(out) g_j / ||g_j||_2   every column has RMS 1
//   rownorm   norm=rms-linf  u_i = g_i / (sqrt(in) ||g_i||_2)  every output is at most 1 on inputs of RMS 1
//   steepest  norm=ANY       u = dualize(g), any norm of norm.h
// clang-format on
//
// The norms of rows and columns are the operator norms into linf and out of l1 (Proposition 8). Rows and
// columns are the paper's, of W (out, in): for an embedding, which is stored (vocabulary, channels), column j
// is the vector of token j. A zero row or column stays zero: a token that the batch did not contain does not
// move. momentum, nesterov and ema as for muon, off by default; ns and steps for the norms of singular
// values.
#include "optim/rule_dual.h"

namespace {
class Steepest final : public DualRule {
 public:
  /// `family` is what the norm must be one of; null: any.
  Steepest(Keyed& keys, const char* fallback, bool (*family)(const Norm&), const char* legal)
      : DualRule(keys, 0.02) {
    Parts parts;
    parts.smoothing = read_smoothing(keys, {});
    parts.norm = read_norm(keys, fallback, family, legal);
    if (is_spectral(parts.norm)) parts.polar = read_polar(keys, "polar-express");
    set(parts);
  }
};

bool of_columns(const Norm& norm) {
  return norm.kind == NormKind::l1_rms || norm.kind == NormKind::l1_lp;
}
bool of_rows(const Norm& norm) {
  return norm.kind == NormKind::rms_linf || norm.kind == NormKind::lp_linf;
}
}  // namespace

std::unique_ptr<Rule> make_rownorm(Keyed& keys) {
  return std::make_unique<Steepest>(keys, "rms-linf", of_rows,
                                    "rms-linf, l2-linf, lp-linf with any p in [1, inf]");
}
std::unique_ptr<Rule> make_colnorm(Keyed& keys) {
  return std::make_unique<Steepest>(keys, "l1-rms", of_columns,
                                    "l1-rms, l1-l2, l1-lp with any p in [1, inf]");
}
std::unique_ptr<Rule> make_steepest(Keyed& keys) {
  return std::make_unique<Steepest>(keys, "frobenius", nullptr, nullptr);
}
