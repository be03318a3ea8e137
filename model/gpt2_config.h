// config.json of a GPT-2 in Hugging Face's words: what lies beside model.safetensors.
#pragma once

#include <cstdint>
#include <string>

#include "model/config.h"

/// The text of config.json. `end_of_text`: the bos and eos id; -1 for V - 1.
std::string gpt2_config_json(const ModelConfig& config, int32_t end_of_text = -1);
/// The opposite; `path` is for messages. RunError names the field: not GPT-2, another activation, ...
ModelConfig parse_gpt2_config(const std::string& text, const std::string& path);
