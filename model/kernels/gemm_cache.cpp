#include "model/kernels/gemm_cache.h"

#include <fmt/format.h>
#include <unistd.h>

#include <charconv>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "json_text.h"

namespace fs = std::filesystem;
using Json = nlohmann::json;

namespace {
constexpr const char* kFormat = "anthology gemm plans 1";

std::string to_hex(const GemmAlgorithm& algorithm) {
  std::string hex;
  for (uint64_t word : algorithm) hex += fmt::format("{:016x}", word);
  return hex;
}

GemmAlgorithm from_hex(const std::string& hex) {
  GemmAlgorithm algorithm{};
  if (hex.size() != algorithm.size() * 16) throw std::runtime_error("an algorithm of another length");
  for (size_t i = 0; i < algorithm.size(); ++i) {
    const char *begin = hex.data() + i * 16, *end = begin + 16;
    if (std::from_chars(begin, end, algorithm[i], 16).ptr != end)
      throw std::runtime_error("an algorithm that is not hexadecimal");
  }
  return algorithm;
}

GemmPlans parse(std::istream& file, const std::string& gpu, const std::string& library) {
  const Json json = require_json(std::string(std::istreambuf_iterator<char>(file), {}));
  if (json.at("format") != kFormat || json.at("gpu") != gpu || json.at("library") != library)
    throw std::runtime_error("written for another GPU, library or version of this program");
  GemmPlans plans;
  for (const auto& [key, entry] : json.at("plans").items()) {
    const bool fused = entry.at("fused").get<bool>();
    plans[key] = {.fused = fused,
                  .algorithm = fused ? from_hex(entry.at("algorithm").get<std::string>()) : GemmAlgorithm{}};
  }
  return plans;
}

/// The file's plans; throws when it exists and cannot be used.
GemmPlans read(const std::string& path, const std::string& gpu, const std::string& library) {
  std::ifstream file(path);
  if (!file && !fs::exists(path)) return {};
  if (!file) throw std::runtime_error("cannot be opened");
  return parse(file, gpu, library);
}
}  // namespace

GemmPlans load_gemm_plans(const std::string& path, const std::string& gpu, const std::string& library) {
  try {
    return read(path, gpu, library);
  } catch (const std::exception& error) {
    fmt::print(stderr, "train_gpt: warning: matrix products are timed anew, {} is not usable: {}\n", path,
               error.what());
    return {};
  }
}

bool save_gemm_plans(const std::string& path, const std::string& gpu, const std::string& library,
                     GemmPlans plans) {
  const std::string temporary = fmt::format("{}.{}.tmp", path, ::getpid());
  try {
    try {
      plans.merge(read(path, gpu, library));  // keeps ours where both have one
    } catch (const std::exception&) {
      // not usable, as the loader said: it is replaced
    }
    Json entries = Json::object();
    for (const auto& [key, plan] : plans) {
      entries[key] = {{"fused", plan.fused}};
      if (plan.fused) entries[key]["algorithm"] = to_hex(plan.algorithm);
    }
    const Json json{{"format", kFormat}, {"gpu", gpu}, {"library", library}, {"plans", entries}};
    if (fs::path(path).has_parent_path()) fs::create_directories(fs::path(path).parent_path());
    std::ofstream file(temporary);
    file << json_text(json, 1) << '\n';
    file.close();
    if (!file) throw std::runtime_error("writing failed");
    fs::rename(temporary, path);
    return true;
  } catch (const std::exception& error) {
    std::error_code ignored;
    fs::remove(temporary, ignored);
    fmt::print(stderr,
               "train_gpt: warning: the choice of matrix products is not kept in {} ({}), the next run may "
               "differ in rounding\n",
               path, error.what());
    return false;
  }
}
