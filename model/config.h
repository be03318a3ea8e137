// The sizes of a model, by name or by hand.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

/// GPT-2 as OpenAI's: LayerNorm with gain and bias (eps 1e-5), learned positions, biases everywhere, tanh
/// GELU. The head is the token embedding, or with tied=0 a matrix of its own.
struct ModelConfig {
  std::string name = "gpt2";
  int64_t L = 12;            // layers
  int64_t NH = 12;           // heads
  int64_t C = 768;           // channels
  int64_t positions = 1024;  // longest sequence
  int64_t V = 50257;         // vocabulary, as the outside sees it
  bool tied = true;          // the head's weight is the token embedding's

  int64_t HS() const { return C / NH; }                       // head size
  int64_t padded_V() const { return (V + 127) / 128 * 128; }  // rows in memory; never visible outside
  bool operator==(const ModelConfig&) const = default;
};

inline constexpr float kLayerNormEps = 1e-5f;

/// Reads "NAME[:key=value,...]" with keys layers, heads, channels, positions, tied, e.g.
/// "gpt2-mini:layers=4,channels=384". The vocabulary comes from the data and is set by the caller. Throws
/// UsageError (text.h) that names what would be legal.
ModelConfig parse_model(const std::string& text);
/// Throws UsageError when sizes are impossible (heads not dividing channels, zero, too large).
void validate(const ModelConfig& config);
/// Names of the presets, smallest first.
std::vector<std::string> model_names();
