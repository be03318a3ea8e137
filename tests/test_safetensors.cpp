// model/safetensors: the format, and damage of every kind.
#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>

#include "error.h"
#include "tests/checkpoint_fixture.h"

namespace fs = std::filesystem;

namespace {

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

}  // namespace
