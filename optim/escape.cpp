#include "optim/escape.h"

#include <fmt/format.h>

#include <charconv>

#include "error.h"
#include "keyed.h"

EscapeOptions parse_escape(const std::string& option, const std::string& text) {
  Keyed keys(option, text);
  EscapeOptions options;
  const std::string& number = keys.name();
  const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), options.first);
  if (error != std::errc() || end != number.data() + number.size() ||
      !(options.first > 0 && options.first < 1))
    throw UsageError(
        fmt::format("'{}' is not a first step size in (0, 1), {}, write one such as 1e-6", number, option));
  options.growth = keys.number("growth", options.growth, 1, std::numeric_limits<double>::infinity());
  options.coefficient = keys.number("coefficient", 1, 1e-9, 1e9);
  keys.finish();
  return options;
}
