// muon and spectral: the polar factor of the smoothed gradient, times a scale that says which norm it is the
// dual vector of.
//
//   m = momentum m + (1 - momentum) g                 ema=0: m = momentum m + g
//   u = scale * polar((1 - momentum) g + momentum m)  nesterov=0: scale * polar(m)
//
//   scale=none        1                               norm l2-l2
//   scale=rms         sqrt(out / in)                  norm rms-rms
//   scale=keller      sqrt(max(1, out / in))          norm spectral-keller
//   scale=moonlight   0.2 sqrt(max(out, in))          norm spectral-moonlight
//
// With moonlight's the elements of u are of about 0.2, as Adam's.
//
// muon defaults to momentum 0.95 with Nesterov, Keller's five steps and scale; spectral to no momentum, Polar
// Express and scale none. K. Jordan, "Muon"; Liu et al., arXiv 2502.16982 (moonlight; PyTorch's
// match_rms_adamw). Each matrix of a fused q, k, v parameter is orthogonalised alone.
//
// Asked for a dual norm it reports <m, u>: exact for ns=svd, and what the step really achieves to first order
// for the approximate methods.
#include <algorithm>
#include <iterator>

#include "optim/rule_dual.h"

namespace {
constexpr const char* kScales[] = {"keller", "rms", "moonlight", "none"};
constexpr NormKind kNorms[] = {NormKind::spectral_keller, NormKind::rms_rms, NormKind::spectral_moonlight,
                               NormKind::l2_l2};

class Muon final : public DualRule {
 public:
  Muon(Keyed& keys, const Smoothing& smoothing, const char* ns, const char* scale) : DualRule(keys, 0.02) {
    set(read_muon(keys, smoothing, ns, scale));
  }
};
}  // namespace

DualRule::Parts read_muon(Keyed& keys, const Smoothing& smoothing, const char* ns, const char* scale) {
  DualRule::Parts parts;
  parts.smoothing = read_smoothing(keys, smoothing);
  parts.polar = read_polar(keys, ns);
  const auto* chosen = std::ranges::find(kScales, keys.choice("scale", scale, kScales));
  parts.norm = {kNorms[chosen - std::begin(kScales)]};
  return parts;
}

std::unique_ptr<Rule> make_muon(Keyed& keys) {
  return std::make_unique<Muon>(keys, Smoothing{.beta = 0.95, .nesterov = true, .ema = true}, "keller5",
                                "keller");
}

std::unique_ptr<Rule> make_spectral(Keyed& keys) {
  return std::make_unique<Muon>(keys, Smoothing{}, "polar-express", "none");
}
