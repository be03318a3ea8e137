// model/safetensors and model/checkpoint: formats, damage, atomic saves, Hugging Face's layout.
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <set>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "data/shards.h"
#include "error.h"
#include "json_text.h"
#include "model/checkpoint.h"
#include "model/gpt2_config.h"
#include "model/safetensors.h"
#include "tests/temporary_folder.h"

namespace fs = std::filesystem;
using Json = nlohmann::json;

namespace {

// Starting weights of a 2-layer GPT-2 (V 61, C 40, NH 5, 22 positions) and tokens, from shared/golden/model.
const std::string kGolden = fs::absolute(fs::path(__FILE__).parent_path() / "data/golden_gpt2").string();

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
    const Json state = {{"step", step}, {"loss", 0.1}};
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
void number(ParameterTable& parameters) {
  float next = 0.5f;
  for (Parameter& p : parameters)
    for (float& value : p.value.floats()) value = next, next += 1.25f;
}

// ---- Safetensors

TEST_F(Checkpoint, SafetensorsRoundTripIsBitwise) {
  // Odd sizes, signed zeros, subnormals, infinities, NaN payloads; every dtype; an empty tensor; a scalar.
  std::vector<float> values(7 * 131);
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = std::bit_cast<float>(static_cast<uint32_t>(i * 2654435761u));
  values[3] = -0.0f, values[4] = std::numeric_limits<float>::infinity(),
  values[5] = std::bit_cast<float>(0x7fc12345u);
  std::vector<int32_t> ints{INT32_MIN, -1, 0, INT32_MAX};
  std::vector<uint16_t> halves{0x3f80, 0xffff, 0x0001};
  float scalar = 3;
  const std::vector<NamedTensor> tensors{
      {"plain", Tensor(values.data(), {7, 131})},
      {"turned \"quoted\" \xc3\xa9", Tensor(values.data(), {131, 7}), true},
      {"cube", Tensor(values.data(), {7, 1, 131})},
      {"ints", Tensor(ints.data(), {2, 2}), true},
      {"halves", Tensor(halves.data(), DType::bf16, {3, 1}), true},
      {"empty", Tensor(values.data(), {0, 4})},
      {"scalar", Tensor(&scalar, Shape{})}};
  write_safetensors(path("a.safetensors"), tensors, {{"format", "pt"}, {"who", "test"}});
  const SafetensorsReader file(path("a.safetensors"));
  EXPECT_EQ(file.metadata().at("format"), "pt");
  EXPECT_EQ(file.metadata().at("who"), "test");
  ASSERT_EQ(file.entries().size(), tensors.size());
  EXPECT_EQ(file.find("turned \"quoted\" \xc3\xa9")->shape, (std::vector<int64_t>{7, 131}));
  EXPECT_EQ(file.find("plain")->begin % 8, 0);
  for (const NamedTensor& tensor : tensors) {
    std::vector<char> bytes(static_cast<size_t>(tensor.value.bytes()) + 8, '\x55');
    NamedTensor copy = tensor;
    copy.value.data = bytes.data();
    file.read(tensor.name, copy);
    EXPECT_EQ(std::memcmp(bytes.data(), tensor.value.data, bytes.size() - 8), 0) << tensor.name;
    EXPECT_EQ(bytes[bytes.size() - 8], '\x55') << tensor.name;
  }
  // Transposed on disk: element (c, r) of the file is (r, c) of the tensor.
  std::vector<float> on_disk(7 * 131);
  file.read("turned \"quoted\" \xc3\xa9", {"x", Tensor(on_disk.data(), {7, 131})});
  for (size_t r = 0; r < 131; ++r)
    for (size_t c = 0; c < 7; ++c)
      ASSERT_EQ(std::bit_cast<uint32_t>(on_disk[c * 131 + r]), std::bit_cast<uint32_t>(values[r * 7 + c]));
  EXPECT_THROW(write_safetensors(path("b"), std::vector<NamedTensor>{tensors[0], tensors[0]}), ShapeError);
  EXPECT_FALSE(fs::exists(path("b")));
  expect_error<RunError>([&] { write_safetensors(path("a.safetensors"), tensors); },
                         {"a.safetensors", "overwritten"});
}

TEST_F(Checkpoint, SafetensorsHalvesBecomeFloats) {
  struct Case {
    const char* dtype;
    uint16_t bits;
    float value;
  };
  const float inf = std::numeric_limits<float>::infinity();
  for (const Case& c : {Case{"F16", 0x3c00, 1},
                        {"F16", 0xc500, -5},
                        {"F16", 0x0001, 0x1p-24f},
                        {"F16", 0x83ff, -1023 * 0x1p-24f},
                        {"F16", 0x0400, 0x1p-14f},
                        {"F16", 0x7bff, 65504},
                        {"F16", 0xfc00, -inf},
                        {"F16", 0x8000, -0.0f},
                        {"BF16", 0x3f80, 1},
                        {"BF16", 0xc0a0, -5},
                        {"BF16", 0x7f80, inf}}) {
    const std::string file =
        raw(fmt::format(R"({{"a":{{"dtype":"{}","shape":[1],"data_offsets":[0,2]}}}})", c.dtype), 0);
    std::ofstream(file, std::ios::binary | std::ios::app).write(reinterpret_cast<const char*>(&c.bits), 2);
    float value = 99;
    SafetensorsReader(file).read("a", {"a", Tensor(&value, {1})});
    EXPECT_EQ(std::bit_cast<uint32_t>(value), std::bit_cast<uint32_t>(c.value)) << c.dtype << " " << c.bits;
  }
  const std::string file = raw(R"({"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}})", 0);
  std::ofstream(file, std::ios::binary | std::ios::app) << "\x01\x7e";
  float value = 0;
  SafetensorsReader(file).read("a", {"a", Tensor(&value, {1})});
  EXPECT_TRUE(std::isnan(value));
}

TEST_F(Checkpoint, EveryDamagedSafetensorsIsOneClearError) {
  const auto bad = [&](const std::string& header, size_t bytes, std::initializer_list<std::string> parts) {
    const std::string file = raw(header, bytes);
    SCOPED_TRACE(header);
    expect_error<RunError>([&] { SafetensorsReader{file}; }, parts);
    expect_error<RunError>([&] { SafetensorsReader{file}; }, {"raw.safetensors"});
  };
  const auto entry = [](const std::string& fields) { return "{\"w\":{" + fields + "}}"; };
  EXPECT_NO_THROW(
      SafetensorsReader{raw(entry(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])") + "   ", 8)});
  EXPECT_NO_THROW(SafetensorsReader{raw("{}", 0)});
  expect_error<RunError>([&] { SafetensorsReader{path("gone")}; }, {"gone", "No such file"});
  write_file("raw.safetensors", "1234567");
  expect_error<RunError>([&] { SafetensorsReader{path("raw.safetensors")}; }, {"7 bytes"});
  write_file("raw.safetensors", std::string("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10));
  expect_error<RunError>([&] { SafetensorsReader{path("raw.safetensors")}; }, {"18446744073709551615"});
  write_file("raw.safetensors", std::string("\x03\0\0\0\0\0\0\0{}", 10));
  expect_error<RunError>([&] { SafetensorsReader{path("raw.safetensors")}; }, {"3 bytes"});
  bad("", 0, {"not valid JSON"});
  bad("{\"w\":", 0, {"not valid JSON"});
  bad("{\"w\xff\":1}", 0, {"not valid JSON"});
  bad("[1]", 0, {"not a JSON object"});
  bad("{\"w\":3}", 0, {"'w'", "object"});
  bad("{\"__metadata__\":3}", 0, {"__metadata__"});
  bad("{\"__metadata__\":{\"a\":3}}", 0, {"__metadata__", "'a'"});
  bad(entry(R"("shape":[2],"data_offsets":[0,8])"), 8, {"'w'", "dtype"});
  bad(entry(R"("dtype":4,"shape":[2],"data_offsets":[0,8])"), 8, {"'w'", "dtype"});
  bad(entry(R"("dtype":"F33","shape":[2],"data_offsets":[0,8])"), 8, {"'w'", "'F33'"});
  bad(entry(R"("dtype":"F32","data_offsets":[0,8])"), 8, {"'w'", "shape"});
  bad(entry(R"("dtype":"F32","shape":2,"data_offsets":[0,8])"), 8, {"'w'", "shape"});
  bad(entry(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"), 8, {"'w'", "shape"});
  bad(entry(R"("dtype":"F32","shape":[2.0],"data_offsets":[0,8])"), 8, {"'w'", "shape"});
  bad(entry(R"("dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,8])"), 8, {"'w'", "shape"});
  bad(entry(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8])"), 8,
      {"'w'", "too large"});
  bad(entry(R"("dtype":"F32","shape":[2])"), 8, {"'w'", "data_offsets"});
  bad(entry(R"("dtype":"F32","shape":[2],"data_offsets":[0])"), 8, {"'w'", "data_offsets"});
  bad(entry(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])"), 8, {"'w'", "data_offsets"});
  bad(entry(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])"), 8, {"'w'", "(3)", "12 bytes", "8"});
  bad(entry(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])"), 7, {"'w'", "truncated to 7"});
  bad(entry(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])"), 9, {"1 bytes follow"});
  bad(entry(R"("dtype":"F32","shape":[2],"data_offsets":[4,12])"), 12, {"'w'", "gap"});
  const std::string one = R"("dtype":"F32","shape":[2],"data_offsets":[0,8])";
  const std::string two = R"("dtype":"F32","shape":[2],"data_offsets":[4,12])";
  bad("{\"a\":{" + one + "},\"b\":{" + two + "}}", 12, {"'b'", "overlaps"});
  bad("{\"a\":{" + one + "},\"a\":{" + one + "}}", 8, {"'a'", "twice"});
  bad("{\"a\\n\\u0001\":{}}", 0, {"'a\\x0a\\x01'"});
}

TEST_F(Checkpoint, ReadingNamesWhatDoesNotFit) {
  const SafetensorsReader file(raw(R"({"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
                                   R"("i":{"dtype":"I64","shape":[1],"data_offsets":[24,32]}})",
                                   32));
  std::vector<float> out(6);
  std::vector<int32_t> ints(6);
  const auto read = [&](const std::string& name, Tensor value, bool turned = false) {
    file.read(name, {"to", value, turned});
  };
  read("w", Tensor(out.data(), {2, 3}));
  read("w", Tensor(out.data(), {3, 2}), true);
  expect_error<RunError>(
      [&] {
        read("x", Tensor(out.data(), {2, 3}));
      },
      {"'x'", "missing", "raw.safetensors"});
  expect_error<RunError>([&] { read("w", Tensor(out.data(), {3, 2})); }, {"'w'", "(2, 3)", "(3, 2)"});
  expect_error<RunError>([&] { read("w", Tensor(out.data(), {2, 3}), true); }, {"'w'", "(2, 3)", "(3, 2)"});
  expect_error<RunError>([&] { read("w", Tensor(out.data(), {6})); }, {"'w'", "(2, 3)", "(6)"});
  expect_error<RunError>([&] { read("w", Tensor(ints.data(), {2, 3})); }, {"'w'", "F32", "i32"});
  expect_error<RunError>([&] { read("i", Tensor(out.data(), {1})); }, {"'i'", "I64", "f32"});
  file.read_first_rows("w", {"to", Tensor(out.data(), {1, 3})});
  expect_error<RunError>(
      [&] {
        file.read_first_rows("w", {"to", Tensor(out.data(), {3, 3})});
      },
      {"'w'", "(3, 3)"});
}

TEST_F(Checkpoint, AFullDiskLeavesNothing) {
  const std::string disk = path("disk");
  const TinyDisk tiny(disk, "128k");
  if (!tiny.mounted()) GTEST_SKIP() << "cannot mount a small disk here (needs root)";
  std::vector<float> values(100'000);
  for (const bool transposed : {false, true}) {
    const std::vector<NamedTensor> large{{"w", Tensor(values.data(), {100, 1000}), transposed}};
    expect_error<RunError>([&] { write_safetensors(disk + "/w.safetensors", large); },
                           {disk + "/w.safetensors", "No space left", "free some space"});
    EXPECT_TRUE(fs::is_empty(disk));
  }
  // A run whose second checkpoint does not fit keeps its first one.
  ParameterTable parameters(small());
  parameters.allocate(ctx_, false);
  number(parameters);
  std::string last;
  int64_t step = 0;
  try {
    for (;; ++step) last = save(step, parameters, small(), 0, Existing::refuse, disk);
  } catch (const RunError& error) {
    EXPECT_NE(std::string(error.what()).find("No space left"), std::string::npos) << error.what();
  }
  ASSERT_GT(step, 0);
  EXPECT_EQ(newest_checkpoint(disk), last);
  EXPECT_FALSE(fs::exists(fmt::format("{}/checkpoints/step-{:08}.tmp", disk, step)));
  ParameterTable loaded(small());
  loaded.allocate(ctx_, false);
  load_parameters(last, loaded);
}

// ---- Checkpoints

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
