// Continuing a text, one token at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "model/gpt.h"

struct SampleOptions {
  int64_t tokens = 256;      // at most this many are drawn
  double temperature = 0.8;  // logits are divided by it; 0 takes the likeliest token
  int64_t top_k = 0;         // draw among the k likeliest; 0: among all
  uint64_t seed = 1337;
  int32_t end_of_text = -1;  // drawing this id ends the text; -1: nothing does
  int64_t context = 0;       // tokens that the model may look back on; 0: all its positions
};

/// Continues `tokens` (at least one) and returns what was drawn, end_of_text excluded. `each` is called with
/// every token as it comes. Once the text is longer than the context, the model sees the last tokens only.
/// Same seed, same model, same number of threads: same text. RunError when the logits are not finite.
std::vector<int32_t> generate(Gpt& model, std::vector<int32_t> tokens, const SampleOptions& options,
                              const std::function<void(int32_t)>& each = {});

/// Draws one id from `logits` (V): softmax(logits / temperature) over the top_k largest; `uniform` in [0, 1).
int32_t draw_token(std::span<const float> logits, const SampleOptions& options, double uniform);
