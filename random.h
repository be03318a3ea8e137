// Random numbers that depend on a key and a position only, never on the order in which they are drawn:
// splitmix64 (Steele, Lea, Flood 2014) as a counter-based generator.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>
#include <string_view>

/// One step of splitmix64's output function: a bijection of 64 bits that mixes well.
inline uint64_t mix_bits(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

/// FNV-1a, to give every tensor name its own stream.
inline uint64_t hash_name(std::string_view name) {
  uint64_t hash = 0xCBF29CE484222325ull;
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3ull;
  return hash;
}

class Random {
 public:
  /// Stream `stream` of seed `seed`: independent for different pairs.
  explicit Random(uint64_t seed, uint64_t stream = 0) : key_(mix_bits(mix_bits(seed) ^ stream)) {}

  uint64_t bits() { return mix_bits(key_ + 0x9E3779B97F4A7C15ull * counter_++); }
  /// Uniform in [0, 1), 53 bits.
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1.0p-53; }
  /// Two independent N(0, 1) numbers by Box and Muller.
  void normal_pair(float& a, float& b) {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    const double angle = 2.0 * std::numbers::pi * uniform();
    a = static_cast<float>(radius * std::cos(angle));
    b = static_cast<float>(radius * std::sin(angle));
  }

 private:
  uint64_t key_;
  uint64_t counter_ = 0;
};
