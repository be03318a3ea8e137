#include "dev/cuda_on_cpu/rounding.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace cuda_on_cpu {
namespace {
uint32_t parse_rounding(const std::string& how) {
  if (how == "exact") return 0;
  const bool gpu = how.rfind("gpu:", 0) == 0;
  if (const uint32_t seed = gpu ? static_cast<uint32_t>(std::stoul(how.substr(4))) + 1 : 0; seed != 0)
    return seed;
  throw std::invalid_argument("cuda_on_cpu: rounding \"" + how + "\", need exact or gpu:SEED");
}

std::atomic<uint32_t>& seed() {
  static std::atomic<uint32_t> seed = [] {
    const char* wish = std::getenv("CUDA_ON_CPU_ROUNDING");
    return parse_rounding(wish != nullptr ? wish : "exact");
  }();
  return seed;
}
}  // namespace

std::string set_rounding(const std::string& how) {
  const uint32_t before = seed().exchange(parse_rounding(how));
  return before == 0 ? "exact" : "gpu:" + std::to_string(before - 1);
}

uint32_t rounding_seed() {
  return seed().load(std::memory_order_relaxed);
}
}  // namespace cuda_on_cpu
