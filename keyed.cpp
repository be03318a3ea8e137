#include "keyed.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>

#include "error.h"

std::string listed(std::span<const char* const> names) {
  std::string text;
  for (const char* name : names) text += (text.empty() ? "" : ", ") + std::string(name);
  return text;
}

Keyed::Keyed(std::string option, const std::string& text) : option_(std::move(option)) {
  const size_t colon = text.find(':');
  name_ = text.substr(0, colon);
  if (name_.empty())
    throw UsageError(fmt::format("no name in '{}', {}, write NAME[:key=value,...]", text, option_));
  if (colon == std::string::npos) return;
  std::string rest = text.substr(colon + 1);
  for (size_t start = 0; start <= rest.size();) {
    const size_t comma = std::min(rest.find(',', start), rest.size());
    const std::string pair = rest.substr(start, comma - start);
    const size_t equals = pair.find('=');
    if (equals == std::string::npos || equals == 0 || equals + 1 == pair.size())
      throw UsageError(
          fmt::format("'{}' is not key=value, {} {}, write NAME[:key=value,...]", pair, option_, text));
    if (!values_.emplace(pair.substr(0, equals), pair.substr(equals + 1)).second)
      throw UsageError(
          fmt::format("key '{}' given twice, {} {}, keep one", pair.substr(0, equals), option_, text));
    start = comma + 1;
  }
}

namespace {
template <typename T>
bool parse(const std::string& text, T& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}
}  // namespace

double Keyed::number(const std::string& key, double fallback, double low, double high) {
  asked(key);
  const auto it = values_.find(key);
  if (it == values_.end()) return fallback;
  double value = 0;
  if (!parse(it->second, value) || !(value >= low && value <= high))
    throw UsageError(fmt::format("{}={} is not a number in [{:g}, {:g}], {} {}, choose one", key, it->second,
                                 low, high, option_, name_));
  return value;
}

int64_t Keyed::integer(const std::string& key, int64_t fallback, int64_t low, int64_t high) {
  asked(key);
  const auto it = values_.find(key);
  if (it == values_.end()) return fallback;
  int64_t value = 0;
  if (!parse(it->second, value) || value < low || value > high)
    throw UsageError(fmt::format("{}={} is not an integer in [{}, {}], {} {}, choose one", key, it->second,
                                 low, high, option_, name_));
  return value;
}

bool Keyed::boolean(const std::string& key, bool fallback) {
  static constexpr const char* kChoices[] = {"0", "1", "false", "true"};
  const std::string value = choice(key, fallback ? "1" : "0", kChoices);
  return value == "1" || value == "true";
}

std::string Keyed::text(const std::string& key, const std::string& fallback) {
  asked(key);
  const auto it = values_.find(key);
  return it == values_.end() ? fallback : it->second;
}

std::string Keyed::choice(const std::string& key, const std::string& fallback,
                          std::span<const char* const> choices) {
  asked(key);
  const auto it = values_.find(key);
  if (it == values_.end()) return fallback;
  for (const char* candidate : choices)
    if (it->second == candidate) return it->second;
  throw UsageError(fmt::format("{}={} is unknown, {} {}, choose one of: {}", key, it->second, option_, name_,
                               listed(choices)));
}

void Keyed::finish() const {
  for (const auto& [key, value] : values_) {
    if (known_.contains(key)) continue;
    const std::string legal = asked_.empty() ? "it takes no keys" : "its keys are: " + asked_;
    throw UsageError(fmt::format("unknown key '{}', {} {}, {}", key, option_, name_, legal));
  }
}

void Keyed::unknown_name(std::span<const std::string> names) const {
  std::string legal;
  for (const std::string& candidate : names) legal += (legal.empty() ? "" : ", ") + candidate;
  throw UsageError(fmt::format("unknown name '{}', {}, choose one of: {}", name_, option_, legal));
}

void Keyed::asked(const std::string& key) {
  if (known_.insert(key).second) asked_ += (asked_.empty() ? "" : ", ") + key;
}
