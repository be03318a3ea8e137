// model/checkpoint: atomic saves, Hugging Face's layout, which one is the newest.
#include <cstring>
#include <filesystem>
#include <functional>
#include <set>

#include "data/shards.h"
#include "error.h"
#include "json_text.h"
#include "model/gpt2_config.h"
#include "tests/checkpoint_fixture.h"

namespace fs = std::filesystem;
using Json = nlohmann::json;

namespace {

TEST_F(Checkpoint, RoundTripIsBitwiseAndPaddingStaysZero) {
  const ModelConfig config = small();
  ParameterTable parameters(config);
  parameters.allocate(ctx_, false);
  number(parameters);
  const std::string folder = save(500, parameters, config);
  EXPECT_EQ(folder, path("run/checkpoints/step-00000500"));
  EXPECT_EQ(checkpoint_step(folder), 500);
  EXPECT_EQ(checkpoint_step(folder + "/"), 500);
  EXPECT_THROW(checkpoint_step(path("run")), RunError);
  EXPECT_EQ(newest_checkpoint(path("run")), folder);
  EXPECT_EQ(read_file(folder + "/tokenizer.json"), "{\"type\":\"byte\"}\n");
  EXPECT_EQ(load_state(folder).at("loss"), 0.1);
  EXPECT_EQ(load_config(folder), config);
  EXPECT_EQ(require_json(read_file(folder + "/config.json"))["eos_token_id"], 7);

  ParameterTable loaded(load_config(folder));
  loaded.allocate(ctx_, false);
  load_parameters(folder, loaded);
  for (const Parameter& p : parameters) {
    EXPECT_EQ(std::memcmp(p.value.data, loaded.at(p.name).value.data, static_cast<size_t>(p.value.bytes())),
              0)
        << p.name;
    if (!p.is_matrix()) continue;
    const Tensor padded = loaded.at(p.name).padded_value();
    for (int64_t i = p.size(); i < padded.size(); ++i) ASSERT_EQ(padded.f32()[i], 0) << p.name;
  }
  // On disk a linear weight is (in, out), embeddings as in memory, and nothing else is there.
  const SafetensorsReader file(folder + "/model.safetensors");
  EXPECT_EQ(file.entries().size(), parameters.rows().size());
  EXPECT_EQ(file.find("h.1.mlp.c_fc.weight")->shape, (std::vector<int64_t>{6, 24}));
  EXPECT_EQ(file.find("wte.weight")->shape, (std::vector<int64_t>{11, 6}));
  EXPECT_EQ(file.metadata().at("format"), "pt");
  float turned[6 * 24];
  file.read("h.1.mlp.c_fc.weight", {"x", Tensor(turned, {6, 24})});
  EXPECT_EQ(turned[1 * 24 + 2], parameters.at("h.1.mlp.c_fc.weight").value.f32()[2 * 6 + 1]);

  float moments[3] = {};
  load_optimizer(folder, std::vector<NamedTensor>{{"wte.weight.m", Tensor(moments, {3})}});
  EXPECT_EQ(moments[2], 500);
  expect_error<RunError>([&] { load_optimizer(folder, {}); }, {"optimizer.safetensors", "'wte.weight.m'"});
  expect_error<RunError>(
      [&] {
        load_optimizer(folder, std::vector<NamedTensor>{{"wte.weight.m", Tensor(moments, {3})},
                                                        {"wpe.weight.m", Tensor(moments, {3})}});
      },
      {"optimizer.safetensors", "'wpe.weight.m'", "missing"});
}

TEST_F(Checkpoint, ReadsTheGoldenModel) {
  const ModelConfig config = load_config(kGolden);
  EXPECT_EQ(config.L, 2);
  EXPECT_EQ(config.NH, 5);
  EXPECT_EQ(config.C, 40);
  EXPECT_EQ(config.positions, 22);
  EXPECT_EQ(config.V, 61);
  ParameterTable parameters(config);
  parameters.allocate(ctx_, false);
  load_parameters(kGolden + "/model.safetensors", parameters);  // the bare file
  // Saved again, every tensor has the bytes of the original, which an independent program wrote.
  const std::string folder = save(0, parameters, config);
  const SafetensorsReader original(kGolden + "/model.safetensors"), again(folder + "/model.safetensors");
  ASSERT_EQ(original.entries().size(), again.entries().size());
  const std::string a = read_file(original.path()), b = read_file(again.path());
  for (const auto& entry : original.entries()) {
    const auto* copy = again.find(entry.name);
    ASSERT_TRUE(copy) << entry.name;
    EXPECT_EQ(copy->shape, entry.shape);
    const auto bytes = [](const std::string& text, const SafetensorsReader::Entry& e) {
      return text.substr(static_cast<size_t>(e.begin), static_cast<size_t>(e.end - e.begin));
    };
    EXPECT_EQ(bytes(a, entry), bytes(b, *copy)) << entry.name;
  }
  // And our config.json says what the golden one says.
  const Json ours = require_json(gpt2_config_json(config)),
             theirs = require_json(read_file(kGolden + "/config.json"));
  for (const auto& [key, value] : theirs.items()) EXPECT_EQ(ours.value(key, Json("none")), value) << key;
  const Shards tokens(kGolden + "/tokens.bin", config.V);
  EXPECT_EQ(tokens.size(), 2141);
  std::vector<int32_t> ids(2141);
  tokens.copy(0, 2141, ids.data());  // all inside the vocabulary
  EXPECT_EQ(ids[0], 60);             // a document starts
}

TEST_F(Checkpoint, AcceptsWhatHuggingFaceFilesHold) {
  const ModelConfig config = small();
  ParameterTable parameters(config), loaded(config);
  parameters.allocate(ctx_, false);
  loaded.allocate(ctx_, false);
  number(parameters);
  float mask[4] = {1, 0, 1, 1}, masked = -1e4f;
  const auto write = [&](const std::string& prefix, bool extras,
                         const std::function<void(std::vector<NamedTensor>&)>& change) {
    std::vector<NamedTensor> tensors;
    for (const Parameter& p : parameters) tensors.push_back({prefix + p.name, p.value, p.transposed_on_disk});
    if (extras) {
      tensors.push_back({"lm_head.weight", parameters.at("wte.weight").value});
      tensors.push_back({prefix + "h.0.attn.bias", Tensor(mask, {1, 1, 2, 2})});
      tensors.push_back({prefix + "h.1.attn.masked_bias", Tensor(&masked, Shape{})});
    }
    if (change) change(tensors);
    write_safetensors(path("model.safetensors"), tensors, {}, Existing::replace);
  };
  for (const char* prefix : {"", "transformer."})
    for (const bool extras : {false, true}) {
      write(prefix, extras, {});
      for (Parameter& p : loaded) std::memset(p.value.data, 0, static_cast<size_t>(p.value.bytes()));
      load_parameters(path("model.safetensors"), loaded);
      for (const Parameter& p : parameters)
        EXPECT_EQ(
            std::memcmp(p.value.data, loaded.at(p.name).value.data, static_cast<size_t>(p.value.bytes())), 0);
    }
  const auto refused = [&](std::initializer_list<std::string> parts,
                           const std::function<void(std::vector<NamedTensor>&)>& change) {
    write("transformer.", false, change);
    expect_error<RunError>([&] { load_parameters(path("model.safetensors"), loaded); }, parts);
  };
  std::vector<float> untied(parameters.at("wte.weight").value.floats().begin(),
                            parameters.at("wte.weight").value.floats().end());
  untied[13] += 1;
  refused({"lm_head.weight", "tied", "model.safetensors"}, [&](auto& t) {
    t.push_back({"lm_head.weight", Tensor(untied.data(), {11, 6})});
  });
  refused({"'transformer.h.2.ln_1.weight'", "not part"}, [&](auto& t) {
    t.push_back({"transformer.h.2.ln_1.weight", Tensor(mask, {4})});
  });
  refused({"'h.2.attn.bias'", "not part"}, [&](auto& t) {
    t.push_back({"h.2.attn.bias", Tensor(mask, {4})});
  });
  refused({"'wte.weight'", "not part"}, [&](auto& t) { t.push_back({"wte.weight", Tensor(mask, {4})}); });
  refused({"'transformer.ln_f.bias'", "missing"}, [&](auto& t) { t.pop_back(); });
  refused({"'transformer.h.0.attn.c_proj.weight'", "(6, 3)", "(6, 6)"}, [&](auto& t) {
    for (NamedTensor& tensor : t)
      if (tensor.name.ends_with("h.0.attn.c_proj.weight")) tensor.value.shape = {3, 6};
  });
}

TEST_F(Checkpoint, MorePositionsOnDiskThanInTheTable) {
  ModelConfig config = small();
  ParameterTable parameters(config);
  parameters.allocate(ctx_, false);
  number(parameters);
  const std::string folder = save(1, parameters, config);
  ModelConfig shorter = config;
  shorter.positions = 3;
  ParameterTable loaded(shorter);
  loaded.allocate(ctx_, false);
  load_parameters(folder, loaded);
  EXPECT_EQ(
      std::memcmp(loaded.at("wpe.weight").value.data, parameters.at("wpe.weight").value.data, 3 * 6 * 4), 0);
  fs::remove(folder + "/config.json");  // then nobody says that this is meant
  EXPECT_FALSE(has_config(folder));
  expect_error<RunError>([&] { load_parameters(folder, loaded); }, {"'wpe.weight'", "(5, 6)", "(3, 6)"});
  expect_error<RunError>([&] { load_config(folder); }, {"config.json", "No such file"});
}

TEST_F(Checkpoint, NewestPassesOverWhatIsNotComplete) {
  const ModelConfig config = small();
  ParameterTable parameters(config);
  parameters.allocate(ctx_, false);
  EXPECT_EQ(newest_checkpoint(path("run")), std::nullopt);
  const std::string good = save(7, parameters, config);
  fs::create_directories(path("run/checkpoints/step-00000009.tmp"));
  fs::create_directories(path("run/checkpoints/my-notes.tmp"));
  fs::create_directories(path("run/checkpoints/step-12"));
  for (const char* damage : {"model.safetensors", "optimizer.safetensors", "config.json", "state.json"})
    for (const bool missing : {true, false}) {
      const std::string later = path("run/checkpoints/step-00000008");
      fs::remove_all(later);
      fs::copy(good, later);
      EXPECT_EQ(newest_checkpoint(path("run")), later);
      if (missing)
        fs::remove(later + "/" + damage);
      else
        fs::resize_file(later + "/" + damage, fs::file_size(later + "/" + damage) - 4);
      std::vector<std::string> passed_over;
      EXPECT_EQ(newest_checkpoint(path("run"), &passed_over), good) << damage;
      ASSERT_EQ(passed_over.size(), 1u);
      EXPECT_NE(passed_over[0].find(later + "/" + damage), std::string::npos) << passed_over[0];
    }
  // The next save removes what it can only have made itself, and nothing else.
  save(10, parameters, config);
  EXPECT_FALSE(fs::exists(path("run/checkpoints/step-00000009.tmp")));
  EXPECT_TRUE(fs::exists(path("run/checkpoints/my-notes.tmp")));
  EXPECT_TRUE(fs::exists(path("run/checkpoints/step-12")));
  // Large steps still sort as numbers.
  const std::string large = save(123'456'789'012, parameters, config);
  EXPECT_EQ(newest_checkpoint(path("run")), large);
}

TEST_F(Checkpoint, KeepsTheLastOnesAndRefusesTakenNames) {
  const ModelConfig config = small();
  ParameterTable parameters(config);
  parameters.allocate(ctx_, false);
  for (const int64_t step : std::vector<int64_t>{0, 5, 10, 15}) save(step, parameters, config, /*keep=*/2);
  std::set<std::string> names;
  for (const auto& entry : fs::directory_iterator(path("run/checkpoints")))
    names.insert(entry.path().filename());
  EXPECT_EQ(names, (std::set<std::string>{"step-00000010", "step-00000015"}));

  const std::string before = read_file(path("run/checkpoints/step-00000015/model.safetensors"));
  number(parameters);
  expect_error<RunError>([&] { save(15, parameters, config); }, {"step-00000015", "nothing is overwritten"});
  EXPECT_EQ(read_file(path("run/checkpoints/step-00000015/model.safetensors")), before);
  save(15, parameters, config, 2, Existing::replace);
  EXPECT_NE(read_file(path("run/checkpoints/step-00000015/model.safetensors")), before);
  EXPECT_FALSE(fs::exists(path("run/checkpoints/step-00000015.tmp")));
  EXPECT_EQ(newest_checkpoint(path("run")), path("run/checkpoints/step-00000015"));
  write_file("file", "");
  expect_error<RunError>([&] { save(1, parameters, config, 0, Existing::refuse, path("file")); },
                         {"file/checkpoints"});
}

TEST_F(Checkpoint, ConfigsThatAreNotOurGpt2AreRefusedByField) {
  const Json good = require_json(gpt2_config_json(small()));
  const auto parse = [](const Json& json) { return parse_gpt2_config(json_text(json), "dir/config.json"); };
  EXPECT_EQ(parse(good), small());
  for (const char* optional :
       {"_name_or_path", "n_inner", "activation_function", "layer_norm_epsilon", "tie_word_embeddings",
        "scale_attn_weights", "architectures", "bos_token_id"}) {
    Json json = good;
    json.erase(optional);
    EXPECT_NO_THROW(parse(json)) << optional;
  }
  for (const char* needed : {"model_type", "n_layer", "n_head", "n_embd", "n_positions", "vocab_size"}) {
    Json json = good;
    json.erase(needed);
    expect_error<RunError>([&] { parse(json); }, {"dir/config.json", fmt::format("'{}' is missing", needed)});
  }
  const std::vector<std::pair<std::string, Json>> wrong{{"model_type", "llama"},
                                                        {"n_layer", 0},
                                                        {"n_layer", "2"},
                                                        {"n_layer", 2.5},
                                                        {"n_layer", -2},
                                                        {"n_layer", 1000000},
                                                        {"n_embd", 1 << 30},
                                                        {"vocab_size", uint64_t{1} << 63},
                                                        {"n_inner", 25},
                                                        {"activation_function", "gelu"},
                                                        {"layer_norm_epsilon", 1e-6},
                                                        {"tie_word_embeddings", "no"},
                                                        {"scale_attn_weights", false},
                                                        {"scale_attn_by_inverse_layer_idx", true},
                                                        {"add_cross_attention", true}};
  for (const auto& [key, value] : wrong) {
    Json json = good;
    json[key] = value;
    expect_error<RunError>([&] { parse(json); }, {"dir/config.json", "'" + key + "'"});
  }
  Json json = good;
  json["n_head"] = 4;  // does not divide 6 channels
  expect_error<RunError>([&] { parse(json); }, {"dir/config.json", "heads"});
  json = good;
  json["_name_or_path"] = "two\nlines";
  EXPECT_EQ(parse(json).name, "gpt2");
  for (const char* text : {"", "[]", "{\"n_layer\": 2", "null"})
    expect_error<RunError>([&] { parse_gpt2_config(text, "dir/config.json"); },
                           {"dir/config.json", "not a JSON object"});
}

}  // namespace
