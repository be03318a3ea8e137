#include "model/generate.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "error.h"
#include "random.h"

int32_t draw_token(std::span<const float> logits, const SampleOptions& options, double uniform) {
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto larger = [&](int32_t a, int32_t b) {
    const float x = logits[static_cast<size_t>(a)], y = logits[static_cast<size_t>(b)];
    return x > y || (x == y && a < b);
  };
  const auto best = *std::min_element(order.begin(), order.end(), larger);
  if (!std::isfinite(logits[static_cast<size_t>(best)]) ||
      std::any_of(logits.begin(), logits.end(), [](float x) { return std::isnan(x); }))
    throw RunError("the model's logits are not finite, generate, use an earlier checkpoint");
  if (options.temperature <= 0) return best;
  if (options.top_k > 0 && options.top_k < static_cast<int64_t>(order.size())) {
    std::nth_element(order.begin(), order.begin() + options.top_k, order.end(), larger);
    order.resize(static_cast<size_t>(options.top_k));
    std::sort(order.begin(), order.end());  // nth_element leaves no defined order
  }
  const double top = logits[static_cast<size_t>(best)];
  std::vector<double> cumulative(order.size());
  double sum = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    sum += std::exp((logits[static_cast<size_t>(order[i])] - top) / options.temperature);
    cumulative[i] = sum;
  }
  const auto it = std::upper_bound(cumulative.begin(), cumulative.end(), uniform * sum);
  return order[std::min(static_cast<size_t>(it - cumulative.begin()), order.size() - 1)];
}

std::vector<int32_t> generate(Gpt& model, std::vector<int32_t> tokens, const SampleOptions& options,
                              const std::function<void(int32_t)>& each) {
  const ModelConfig& config = model.config();
  const int64_t context = std::min(
      {options.context > 0 ? options.context : config.positions, config.positions, model.max_tokens()});
  std::vector<float> logits(static_cast<size_t>(config.padded_V()));
  std::vector<int32_t> drawn;
  Random random(options.seed, hash_name("generate"));
  int64_t done = 0;  // tokens whose keys and values the model holds
  while (static_cast<int64_t>(drawn.size()) < options.tokens) {
    const auto seen = std::min<int64_t>(context, static_cast<int64_t>(tokens.size()));
    int32_t* window = tokens.data() + (static_cast<int64_t>(tokens.size()) - seen);
    // While the text grows inside the window, only its last token is new; once the window slides, every
    // position is.
    const int64_t known = model.can_extend() && window == tokens.data() ? done : 0;
    model.next_token_logits(Tensor(window, {1, seen}), Tensor(logits.data(), {1, config.padded_V()}), known);
    done = seen;
    const int32_t next =
        draw_token({logits.data(), static_cast<size_t>(config.V)}, options, random.uniform());
    if (next == options.end_of_text) break;
    tokens.push_back(next);
    drawn.push_back(next);
    if (each) each(next);
  }
  return drawn;
}
