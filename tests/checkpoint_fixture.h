// A folder of checkpoints of a small model, for tests of safetensors and checkpoints.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "model/checkpoint.h"
#include "model/safetensors.h"
#include "tests/temporary_folder.h"

// Starting weights of a 2-layer GPT-2 (V 61, C 40, NH 5, 22 positions) and tokens, from shared/golden/model.
inline const std::string kGolden =
    std::filesystem::absolute(std::filesystem::path(__FILE__).parent_path() / "data/golden_gpt2").string();

class Checkpoint : public ::testing::Test {
 protected:
  Checkpoint() { use_cpu(ctx_, 2); }
  std::string path(const std::string& name) const { return folder_.path(name); }
  void write_file(const std::string& name, const std::string& bytes) const { folder_.write(name, bytes); }
  std::string read_file(const std::string& path) const { return folder_.read(path); }
  // A safetensors file from a header and a number of data bytes.
  std::string raw(const std::string& header, size_t data_bytes) const {
    const uint64_t length = header.size();
    std::string bytes(8, '\0');
    std::memcpy(bytes.data(), &length, 8);
    write_file("raw.safetensors", bytes + header + std::string(data_bytes, '\2'));
    return path("raw.safetensors");
  }
  // A small model with distinct values.
  static ModelConfig small() { return {.name = "test", .L = 2, .NH = 2, .C = 6, .positions = 5, .V = 11}; }
  std::string save(int64_t step, const ParameterTable& parameters, const ModelConfig& config,
                   int64_t keep = 0, Existing existing = Existing::refuse,
                   const std::string& out = "") const {
    float moments[3] = {1, 2, static_cast<float>(step)};
    const std::vector<NamedTensor> optimizer{{"wte.weight.m", Tensor(moments, {3})}};
    const nlohmann::json state = {{"step", step}, {"loss", 0.1}};
    return save_checkpoint({.out = out.empty() ? path("run") : out,
                            .step = step,
                            .config = config,
                            .parameters = parameters,
                            .optimizer = optimizer,
                            .state = state,
                            .tokenizer = "{\"type\":\"byte\"}\n",
                            .end_of_text = 7,
                            .keep = keep,
                            .existing = existing});
  }
  TemporaryFolder folder_;
  Context ctx_;
};

// Fills all values with numbers that say where they are.
inline void number(ParameterTable& parameters) {
  float next = 0.5f;
  for (Parameter& p : parameters)
    for (float& value : p.value.floats()) value = next, next += 1.25f;
}
