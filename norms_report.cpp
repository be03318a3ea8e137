#include "norms_report.h"

#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>

namespace {
/// To six digits: a line has some hundred numbers.
nlohmann::ordered_json number(double x) {
  if (!std::isfinite(x)) return nullptr;
  return std::stod(fmt::format("{:.6g}", x));
}

std::string band_text(const TensorNorms& tensor) {
  return tensor.band ? fmt::format("{:.3g} .. {:.3g}", tensor.band->low, tensor.band->high) : "";
}
}  // namespace

nlohmann::ordered_json norms_line(const StepNorms& norms) {
  nlohmann::ordered_json tensors = nlohmann::ordered_json::object();
  for (const TensorNorms& t : norms.tensors) {
    nlohmann::ordered_json& line = tensors[t.name];
    line = {{"role", role_name(t.role)},
            {"norm_name", norm_name(t.norm)},
            {"weight", number(t.weight)},
            {"update", number(t.update)},
            {"gradient_dual", number(t.gradient_dual)},
            {"alignment", number(t.alignment)},
            {"sharpness", number(t.sharpness)},
            {"step", number(t.step)},
            {"s_step", number(t.s_step)}};
    if (t.band) line["band"] = {number(t.band->low), number(t.band->high)};
  }
  return {{"type", "norms"},
          {"step", norms.step},
          {"loss", norms.loss},
          {"loss_after", norms.loss_after},
          {"predicted", number(norms.predicted)},
          {"bound", norms.bound},
          {"length", number(norms.length)},
          {"sharpness", number(norms.sharpness)},
          {"tensors", tensors}};
}

std::string norms_table(const StepNorms& norms) {
  std::string text = fmt::format(
      "step {}: loss {:.6f}, after it {:.6f} on the same batch; predicted {:.6f}, bound {:.6f}; modular "
      "length {:.3g}, sharpness {:.3g}\n",
      norms.step, norms.loss, norms.loss_after, norms.loss + norms.predicted, norms.bound, norms.length,
      norms.sharpness);
  text += fmt::format("{:<28} {:<18} {:>9} {:>9} {:>9} {:>6} {:>9}  {}\n", "tensor", "norm", "||W||",
                      "||step||", "||G||dual", "align", "sharpness", "singular values of u");
  int vectors = 0;
  for (const TensorNorms& t : norms.tensors) {
    if (t.role == Role::vector || t.role == Role::scalar) {
      ++vectors;
      continue;
    }
    text += fmt::format("{:<28} {:<18} {:>9.3g} {:>9.3g} {:>9.3g} {:>6.3f} {:>9.3g}  {}\n", t.name,
                        norm_name(t.norm), t.weight, t.step, t.gradient_dual, t.alignment, t.sharpness,
                        band_text(t));
  }
  return text + fmt::format("and {} vectors, in log.jsonl\n", vectors);
}
