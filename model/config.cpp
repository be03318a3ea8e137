#include "model/config.h"

#include <fmt/format.h>

#include "error.h"
#include "keyed.h"

namespace {
struct Preset {
  const char* name;
  int64_t L, NH, C, positions;
};

// The four of Radford et al. 2019, and small ones that a laptop trains in minutes.
constexpr Preset kPresets[] = {
    {"gpt2-nano", 3, 3, 48, 256},         // 0.1M parameters with a byte vocabulary: tests
    {"gpt2-micro", 4, 4, 128, 256},       // 0.8M
    {"gpt2-mini", 6, 6, 192, 256},        // 2.8M
    {"gpt2-small", 6, 6, 384, 1024},      // 11M
    {"gpt2", 12, 12, 768, 1024},          // 124M
    {"gpt2-medium", 24, 16, 1024, 1024},  // 355M
    {"gpt2-large", 36, 20, 1280, 1024},   // 774M
    {"gpt2-xl", 48, 25, 1600, 1024},      // 1558M
};
}  // namespace

std::vector<std::string> model_names() {
  std::vector<std::string> names;
  for (const Preset& preset : kPresets) names.emplace_back(preset.name);
  return names;
}

ModelConfig parse_model(const std::string& text) {
  Keyed keyed("--model", text);
  for (const Preset& preset : kPresets) {
    if (keyed.name() != preset.name) continue;
    ModelConfig config;
    config.name = text;
    config.L = keyed.integer("layers", preset.L, 1, 1000);
    config.NH = keyed.integer("heads", preset.NH, 1, 1000);
    config.C = keyed.integer("channels", preset.C, 1, 100000);
    config.positions = keyed.integer("positions", preset.positions, 1, 1 << 20);
    config.tied = keyed.boolean("tied", true);
    keyed.finish();
    validate(config);
    return config;
  }
  keyed.unknown_name(model_names());
}

void validate(const ModelConfig& config) {
  const auto fail = [&](const std::string& what, const char* hint) {
    throw UsageError(fmt::format("{}, --model {}, {}", what, config.name, hint));
  };
  if (config.L < 1 || config.NH < 1 || config.C < 1 || config.positions < 1 || config.V < 1)
    fail("layers, heads, channels, positions and the vocabulary must be at least 1", "choose larger sizes");
  if (config.C % config.NH != 0)
    fail(fmt::format("{} channels cannot be shared by {} heads", config.C, config.NH),
         "choose channels as a multiple of heads");
  if (config.V > (int64_t{1} << 30)) fail("the vocabulary is larger than 2^30", "choose a smaller one");
}
