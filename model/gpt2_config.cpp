#include "model/gpt2_config.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "error.h"
#include "files.h"
#include "json_text.h"

using Json = nlohmann::json;

std::string gpt2_config_json(const ModelConfig& config, int32_t end_of_text) {
  const int64_t end = end_of_text >= 0 ? end_of_text : config.V - 1;
  const nlohmann::ordered_json json = {{"architectures", {"GPT2LMHeadModel"}},
                                       {"model_type", "gpt2"},
                                       {"_name_or_path", config.name},
                                       {"n_layer", config.L},
                                       {"n_head", config.NH},
                                       {"n_embd", config.C},
                                       {"n_positions", config.positions},
                                       {"n_ctx", config.positions},
                                       {"n_inner", nullptr},
                                       {"vocab_size", config.V},
                                       {"activation_function", "gelu_new"},  // tanh GELU
                                       {"layer_norm_epsilon", 1e-5},
                                       {"initializer_range", 0.02},
                                       {"scale_attn_weights", true},
                                       {"tie_word_embeddings", config.tied},
                                       {"embd_pdrop", 0.0},
                                       {"attn_pdrop", 0.0},
                                       {"resid_pdrop", 0.0},
                                       {"use_cache", true},
                                       {"bos_token_id", end},
                                       {"eos_token_id", end},
                                       {"torch_dtype", "float32"}};
  return json_text(json, 1) + "\n";
}

namespace {

/// The fields of a config.json, with errors that name them.
class Fields {
 public:
  Fields(const std::string& text, const std::string& path) : path_(path), json_(parse_json(text)) {
    if (!json_.is_object())
      throw RunError(
          fmt::format("the model config is not a JSON object, {}, use an undamaged config.json", path));
  }
  bool has(const char* key) const { return json_.contains(key) && !json_[key].is_null(); }
  int64_t integer(const char* key, uint64_t limit) const {
    if (!has(key)) fail(fmt::format("field '{}' is missing", key), "use GPT-2's config.json");
    const Json& value = json_[key];
    if (!value.is_number_unsigned() || value.get<uint64_t>() < 1 || value.get<uint64_t>() > limit)
      fail(fmt::format("field '{}' is not an integer in [1, {}]", key, limit), "use GPT-2's config.json");
    return value.get<int64_t>();
  }
  bool boolean(const char* key, bool fallback) const {
    if (!has(key)) return fallback;
    if (!json_[key].is_boolean())
      fail(fmt::format("field '{}' is not true or false", key), "use GPT-2's config.json");
    return json_[key].get<bool>();
  }
  std::string text(const char* key, const std::string& fallback) const {
    return has(key) && json_[key].is_string() ? json_[key].get<std::string>() : fallback;
  }
  // The field is absent (then Hugging Face's default, which is ours, holds) or has this value.
  void must_be(const char* key, const Json& expected) const {
    if (!has(key) || json_[key] == expected) return;
    const std::string got = lossy_json_text(json_[key], Characters::ascii);
    fail(fmt::format("field '{}' is {}, but only {} is supported", key, in_quotes(got), json_text(expected)),
         "use a GPT-2 model");
  }
  [[noreturn]] void fail(const std::string& what, const std::string& advice) const {
    throw RunError(fmt::format("{} in the model config, {}, {}", what, path_, advice));
  }

 private:
  std::string path_;
  Json json_;
};

}  // namespace

ModelConfig parse_gpt2_config(const std::string& text, const std::string& path) {
  const Fields fields(text, path);
  if (!fields.has("model_type")) fields.fail("field 'model_type' is missing", "use GPT-2's config.json");
  fields.must_be("model_type", "gpt2");
  ModelConfig config;
  config.name = fields.text("_name_or_path", "gpt2");
  if (in_quotes(config.name) != "'" + config.name + "'") config.name = "gpt2";  // it goes into messages
  // The limits of --model: a damaged size must not become an attempt to allocate it.
  config.L = fields.integer("n_layer", 1000);
  config.NH = fields.integer("n_head", 1000);
  config.C = fields.integer("n_embd", 100'000);
  config.positions = fields.integer("n_positions", 1 << 20);
  config.V = fields.integer("vocab_size", 1 << 30);
  fields.must_be("n_inner", 4 * config.C);
  fields.must_be("activation_function", "gelu_new");
  fields.must_be("layer_norm_epsilon", 1e-5);
  fields.must_be("scale_attn_weights", true);
  fields.must_be("scale_attn_by_inverse_layer_idx", false);
  fields.must_be("add_cross_attention", false);
  config.tied = fields.boolean("tie_word_embeddings", true);
  try {
    validate(config);
  } catch (const UsageError& error) {
    fields.fail(error.what(), "use sizes that fit together");
  }
  return config;
}
