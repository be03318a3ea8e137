// "NAME:key=value,key=value": the small language of --hidden, --model and the like.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>

/// "a, b, c", for messages.
std::string listed(std::span<const char* const> names);

/// A parsed text. Every getter marks its key as known; finish() rejects keys that nobody asked for.
class Keyed {
 public:
  /// `option` is what the user typed it after ("--hidden"), for messages. Throws UsageError on bad syntax.
  Keyed(std::string option, const std::string& text);

  const std::string& name() const { return name_; }
  const std::string& option() const { return option_; }
  /// The value of `key`, or `fallback`; UsageError unless it is a number in [low, high].
  double number(const std::string& key, double fallback, double low, double high);
  int64_t integer(const std::string& key, int64_t fallback, int64_t low, int64_t high);
  bool boolean(const std::string& key, bool fallback);  // 0, 1, true, false
  std::string text(const std::string& key, const std::string& fallback);
  /// One of `choices`.
  std::string choice(const std::string& key, const std::string& fallback,
                     std::span<const char* const> choices);
  /// UsageError naming the first unknown key and the keys that were asked for.
  void finish() const;
  /// The error to throw when name() is none of `names`.
  [[noreturn]] void unknown_name(std::span<const std::string> names) const;

 private:
  void asked(const std::string& key);
  std::string option_, name_;
  std::map<std::string, std::string> values_;
  std::set<std::string> known_;  // keys that somebody asked for
  std::string asked_;            // the same, comma-separated in the order of asking, for the message
};
