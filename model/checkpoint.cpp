#include "model/checkpoint.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <filesystem>

#include <fmt/format.h>

#include "error.h"

namespace fs = std::filesystem;
using Json = nlohmann::json;

namespace {

constexpr const char* kModel = "model.safetensors";
constexpr const char* kConfig = "config.json";
constexpr const char* kOptimizer = "optimizer.safetensors";
constexpr const char* kState = "state.json";
constexpr const char* kTemporary = ".tmp";

// The step of "step-00000500", or -1 for any other name.
int64_t step_of(std::string_view name) {
  constexpr std::string_view kPrefix = "step-";
  if (!name.starts_with(kPrefix) || name.size() < kPrefix.size() + 8) return -1;
  name.remove_prefix(kPrefix.size());
  int64_t step = -1;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), step);
  return error == std::errc() && end == name.data() + name.size() && name[0] != '-' ? step : -1;
}

std::string folder_of_run(const std::string& out) {
  return out + "/checkpoints";
}

// Checkpoint folders of a run by step, newest first.
std::vector<std::pair<int64_t, std::string>> list_checkpoints(const std::string& out) {
  std::vector<std::pair<int64_t, std::string>> found;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder_of_run(out), error)) {
    const int64_t step = step_of(entry.path().filename().string());
    if (step >= 0) found.emplace_back(step, entry.path().string());
  }
  std::sort(found.rbegin(), found.rend());
  return found;
}

// Removes what an interrupted save or removal left: only folders whose name this file makes.
void remove_stale(const std::string& folder) {
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename();
    const size_t stem = name.size() - std::min(name.size(), std::strlen(kTemporary));
    if (name.substr(stem) == kTemporary && step_of(std::string_view(name).substr(0, stem)) >= 0)
      fs::remove_all(entry);
  }
}

// A folder never disappears file by file under its final name: a crash in between would leave a damaged one.
void remove_checkpoint(const std::string& folder) {
  const std::string condemned = folder + kTemporary;
  fs::rename(folder, condemned);
  fs::remove_all(condemned);
}

std::string hash_text(const std::string& path) {
  return fmt::format("{:016x}", hash_file(path));
}

// Throws when a file is not, bit for bit, what state.json says was saved. Folders of other programs have no
// hashes.
void verify(const std::string& folder, const char* name) {
  std::error_code ignored;
  if (!fs::exists(folder + "/" + kState, ignored)) return;
  const Json state = load_state(folder);
  const auto hashes = state.find("hashes");
  if (hashes == state.end() || !hashes->is_object() || !hashes->contains(name)) return;
  const std::string path = folder + "/" + name;
  if ((*hashes)[name] != hash_text(path))
    throw RunError(fmt::format("its bytes are not those that were saved, {}, use another checkpoint", path));
}

void write_files(const CheckpointToSave& what, const std::string& folder) {
  std::vector<NamedTensor> tensors;
  for (const Parameter& p : what.parameters)
    tensors.push_back({p.name, p.value, p.transposed_on_disk, what.parameters.context()});
  write_safetensors(folder + "/" + kModel, tensors);
  write_text(folder + "/" + kConfig, gpt2_config_json(what.config, what.end_of_text), Existing::refuse);
  write_safetensors(folder + "/" + kOptimizer, what.optimizer);
  Json state = what.state;
  for (const char* name : {kModel, kOptimizer}) state["hashes"][name] = hash_text(folder + "/" + name);
  write_text(folder + "/" + kState, state.dump(1) + "\n", Existing::refuse);
  if (!what.tokenizer.empty()) write_text(folder + "/tokenizer.json", what.tokenizer, Existing::refuse);
}

std::string save(const CheckpointToSave& what) {
  expect(what.step >= 0, "save_checkpoint: negative step");
  const std::string parent = folder_of_run(what.out);
  std::string folder = fmt::format("{}/step-{:08}", parent, what.step);
  const std::string temporary = folder + kTemporary;
  make_folder(parent);
  sync_folder(what.out);
  const FolderLock lock(parent);
  remove_stale(parent);
  if (what.existing == Existing::refuse && fs::exists(folder))
    throw RunError(fmt::format(
        "a checkpoint of this step exists and nothing is overwritten, {}, choose another --out", folder));
  try {
    make_folder(temporary);
    write_files(what, temporary);
    sync_folder(temporary);
    rename_folder(temporary, folder, what.existing);
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(temporary, ignored);
    throw;
  }
  fs::remove_all(temporary);  // the replaced one, if there was one
  // The new one is complete and on disk: only now may older ones go.
  int64_t kept = 0;
  for (const auto& [step, path] : list_checkpoints(what.out))
    if (what.keep > 0 && step <= what.step && ++kept > what.keep) remove_checkpoint(path);
  return folder;
}

// Why a checkpoint cannot be used, or "" when it can: reads everything once.
std::string flaw(const std::string& folder) {
  try {
    load_config(folder);
    load_state(folder);
    for (const char* name : {kModel, kOptimizer}) {
      const SafetensorsReader header_is_sound(folder + "/" + name);
      verify(folder, name);
    }
    return "";
  } catch (const RunError& error) {
    return error.what();
  }
}

// The .safetensors file that `path` (a folder or the file) means.
std::string model_file(const std::string& path) {
  std::error_code ignored;
  return fs::is_directory(path, ignored) ? path + "/" + kModel : path;
}

std::string config_file(const std::string& path) {
  return (fs::path(model_file(path)).parent_path() / kConfig).string();
}

}  // namespace

std::string save_checkpoint(const CheckpointToSave& what) {
  try {
    return save(what);
  } catch (const fs::filesystem_error& error) {
    throw RunError(fmt::format("cannot write the checkpoint ({}), {}, check the folder and its permissions",
                               error.code().message(), error.path1().string()));
  }
}

std::optional<std::string> newest_checkpoint(const std::string& out, std::vector<std::string>* passed_over) {
  for (const auto& [step, folder] : list_checkpoints(out)) {
    const std::string why_not = flaw(folder);
    if (why_not.empty()) return folder;
    if (passed_over) passed_over->push_back(why_not);
  }
  return std::nullopt;
}

int64_t checkpoint_step(const std::string& folder) {
  fs::path path(folder);
  if (path.filename().empty()) path = path.parent_path();  // "step-00000500/"
  const int64_t step = step_of(path.filename().string());
  if (step < 0)
    throw RunError(fmt::format("the folder is not named like a checkpoint, {}, name one step-...", folder));
  return step;
}

bool has_config(const std::string& path) {
  std::error_code ignored;
  return fs::exists(config_file(path), ignored);
}

ModelConfig load_config(const std::string& path) {
  const std::string file = config_file(path);
  return parse_gpt2_config(read_text(file, "model config"), file);
}

namespace {

// Buffers of older GPT-2 files, no weights: the causal mask and the value it puts in.
bool is_mask(const std::string& name, const ParameterTable& parameters) {
  for (const char* suffix : {".attn.bias", ".attn.masked_bias"}) {
    if (!name.ends_with(suffix)) continue;
    const std::string block = name.substr(0, name.size() - std::strlen(suffix));
    for (const Parameter& p : parameters)
      if (p.name == block + ".ln_1.weight") return true;
  }
  return false;
}

// lm_head.weight may be there when it repeats the token embedding, as a tied model saved it.
void check_head(const SafetensorsReader& file, const SafetensorsReader::Entry& head,
                const std::string& embedding) {
  const auto* wte = file.find(embedding);
  const bool tied =
      wte && wte->dtype == head.dtype && wte->shape == head.shape && file.same_values(*wte, head);
  if (!tied)
    throw RunError(fmt::format(
        "tensor 'lm_head.weight' differs from the token embedding, {}, use a model with a tied head",
        file.path()));
}

}  // namespace

void load_parameters(const std::string& path, ParameterTable& parameters) {
  const SafetensorsReader file(model_file(path));
  if (fs::is_directory(path)) verify(path, kModel);
  const std::string prefix = file.find("transformer.wte.weight") ? "transformer." : "";
  for (const SafetensorsReader::Entry& entry : file.entries()) {
    if (entry.name == "lm_head.weight") {
      check_head(file, entry, prefix + "wte.weight");
      continue;
    }
    const std::string name = entry.name.starts_with(prefix) ? entry.name.substr(prefix.size()) : "";
    const bool known =
        std::any_of(parameters.begin(), parameters.end(), [&](const Parameter& p) { return p.name == name; });
    if (!known && !is_mask(name, parameters))
      throw RunError(
          fmt::format("tensor {} is not part of this model, {}, use a file of the same model and size",
                      in_quotes(entry.name), file.path()));
  }
  const int64_t positions_in_file = has_config(path) ? load_config(path).positions : 0;
  for (const Parameter& p : parameters) {
    const NamedTensor to{p.name, p.value, p.transposed_on_disk, parameters.context()};
    const auto* entry = file.find(prefix + p.name);
    const bool longer = p.role == Role::position && entry && entry->shape.size() == 2 &&
                        entry->shape[0] == positions_in_file && positions_in_file > p.shape[0];
    if (longer)
      file.read_first_rows(prefix + p.name, to);
    else
      file.read(prefix + p.name, to);
  }
  parameters.refresh_compute();
}

void load_optimizer(const std::string& folder, std::span<const NamedTensor> tensors) {
  const SafetensorsReader file(folder + "/" + kOptimizer);
  for (const SafetensorsReader::Entry& entry : file.entries()) {
    const bool known = std::any_of(tensors.begin(), tensors.end(),
                                   [&](const NamedTensor& t) { return t.name == entry.name; });
    if (!known)
      throw RunError(
          fmt::format("tensor {} is not part of this optimizer, {}, resume with the rules of that run",
                      in_quotes(entry.name), file.path()));
  }
  for (const NamedTensor& tensor : tensors) file.read(tensor.name, tensor);
}

Json load_state(const std::string& folder) {
  const std::string path = folder + "/" + kState;
  Json json = Json::parse(read_text(path, "training state"), nullptr, false);
  if (!json.is_object())
    throw RunError(fmt::format("the training state is not a JSON object, {}, use another checkpoint", path));
  return json;
}

// ---- config.json

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
                                       {"tie_word_embeddings", true},
                                       {"embd_pdrop", 0.0},
                                       {"attn_pdrop", 0.0},
                                       {"resid_pdrop", 0.0},
                                       {"use_cache", true},
                                       {"bos_token_id", end},
                                       {"eos_token_id", end},
                                       {"torch_dtype", "float32"}};
  return json.dump(1) + "\n";
}

namespace {

/// The fields of a config.json, with errors that name them.
class Fields {
 public:
  Fields(const std::string& text, const std::string& path)
      : path_(path), json_(Json::parse(text, nullptr, false)) {
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
  std::string text(const char* key, const std::string& fallback) const {
    return has(key) && json_[key].is_string() ? json_[key].get<std::string>() : fallback;
  }
  // The field is absent (then Hugging Face's default, which is ours, holds) or has this value.
  void must_be(const char* key, const Json& expected) const {
    if (!has(key) || json_[key] == expected) return;
    const std::string got = json_[key].dump(-1, ' ', true, Json::error_handler_t::replace);
    fail(fmt::format("field '{}' is {}, but only {} is supported", key, in_quotes(got), expected.dump()),
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
  fields.must_be("tie_word_embeddings", true);
  try {
    validate(config);
  } catch (const UsageError& error) {
    fields.fail(error.what(), "use sizes that fit together");
  }
  return config;
}
