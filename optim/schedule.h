// How the step size changes over a run: a multiplier in [0, 1] on every rule's lr.
//
// With w = warmup steps, n = total steps, f = the final fraction, and k the step counted from 0:
//
//   k < w       (k + 1) / w                                                     all kinds: linear warm-up
//   constant    1
//   linear      f + (1 - f) (n - k) / (n - w)
//   cosine      f + (1 - f) (1 + cos(pi (k - w) / (n - w))) / 2
//   wsd         1 until the last c n steps, then f + (1 - f) (n - k) / (c n)    warm-up, stable, decay
//
// The last update (k = n - 1) is still above f: no step is wasted on a zero step size.
#pragma once

#include <cstdint>
#include <span>
#include <string>

struct Schedule {
  enum class Kind : uint8_t { constant, linear, cosine, wsd };
  Kind kind = Kind::constant;
  int64_t warmup = 0;     // steps; a run shorter than that never leaves the warm-up
  double cooldown = 0.4;  // wsd: the fraction of the run that decays, in (0, 1]
  double final = 0;       // what is left at the end, in [0, 1]

  /// The multiplier of step k of `total`; total <= 0 means an open-ended run, whose schedule never decays.
  double multiplier(int64_t step, int64_t total) const;
  /// "wsd:warmup=100,cooldown=0.4,final=0", which parse_schedule reads back.
  std::string str() const;
};

/// Reads "KIND[:warmup=N,cooldown=F,final=F]"; throws UsageError naming what would be legal. `option` is what
/// the user typed it after ("--schedule").
Schedule parse_schedule(const std::string& option, const std::string& text);
/// The kinds, for help texts.
std::span<const char* const> schedule_names();
