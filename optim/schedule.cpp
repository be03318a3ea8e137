#include "optim/schedule.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <numbers>
#include <vector>

#include "error.h"
#include "keyed.h"

namespace {
constexpr const char* kNames[] = {"constant", "linear", "cosine", "wsd"};
}

std::span<const char* const> schedule_names() {
  return kNames;
}

double Schedule::multiplier(int64_t step, int64_t total) const {
  if (step < warmup) return static_cast<double>(step + 1) / static_cast<double>(warmup);
  if (total <= 0 || kind == Kind::constant) return 1;
  const double left =
      static_cast<double>(std::max<int64_t>(total - step, 0));  // steps to go, this one included
  const double after_warmup = static_cast<double>(std::max<int64_t>(total - warmup, 1));
  switch (kind) {
    case Kind::constant:
      break;
    case Kind::linear:
      return final + (1 - final) * left / after_warmup;
    case Kind::cosine:
      return final + (1 - final) * (1 - std::cos(std::numbers::pi * left / after_warmup)) / 2;
    case Kind::wsd:
      return final + (1 - final) * std::min(1.0, left / (cooldown * static_cast<double>(total)));
  }
  return 1;
}

std::string Schedule::str() const {
  std::string text = fmt::format("{}:warmup={}", kNames[static_cast<size_t>(kind)], warmup);
  if (kind == Kind::wsd) text += fmt::format(",cooldown={}", cooldown);
  if (kind != Kind::constant) text += fmt::format(",final={}", final);
  return text;
}

Schedule parse_schedule(const std::string& option, const std::string& text) {
  Keyed keys(option, text);
  const auto* found = std::find(std::begin(kNames), std::end(kNames), keys.name());
  if (found == std::end(kNames))
    keys.unknown_name(std::vector<std::string>(std::begin(kNames), std::end(kNames)));
  Schedule schedule{.kind = static_cast<Schedule::Kind>(found - std::begin(kNames))};
  schedule.warmup = keys.integer("warmup", 0, 0, int64_t{1} << 40);
  if (schedule.kind == Schedule::Kind::wsd) schedule.cooldown = keys.number("cooldown", 0.4, 1e-6, 1);
  if (schedule.kind != Schedule::Kind::constant) schedule.final = keys.number("final", 0, 0, 1);
  keys.finish();
  return schedule;
}
