#include "data/tokenizer.h"

#include <sys/stat.h>

#include <array>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "data/shards.h"
#include "error.h"
#include "files.h"
#include "json_text.h"

namespace {

/// Ids 0 to 255 are bytes, 256 is end of text.
class ByteTokenizer : public Tokenizer {
 public:
  ByteTokenizer() {
    for (size_t i = 0; i < bytes_.size(); ++i) bytes_[i] = static_cast<char>(i);
  }
  std::string name() const override { return "byte"; }
  int64_t vocab_size() const override { return 257; }
  int32_t end_of_text() const override { return 256; }

  void encode(std::string_view text, std::vector<uint16_t>& ids) const override {
    const size_t start = ids.size();
    ids.resize(start + text.size());
    uint16_t* to = ids.data() + start;
    for (size_t i = 0; i < text.size(); ++i) to[i] = static_cast<unsigned char>(text[i]);
  }
  std::string_view decode(int32_t id) const override {
    if (id < 0 || id > 256)
      throw RunError(fmt::format("token id {} does not exist, byte tokenizer, ids are 0 to 256", id));
    return id == 256 ? std::string_view() : std::string_view(&bytes_[static_cast<size_t>(id)], 1);
  }
  size_t cut(std::string_view text, size_t at) const override { return std::min(at, text.size()); }
  std::string json() const override {
    return json_text(nlohmann::ordered_json{{"type", "byte"}, {"vocab_size", 257}, {"end_of_text", 256}}) +
           "\n";
  }

 private:
  std::array<char, 256> bytes_;
};

std::string file_in(const std::string& folder) {
  return folder + "/tokenizer.json";
}

}  // namespace

std::vector<int32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<uint16_t> ids;
  encode(text, ids);
  return {ids.begin(), ids.end()};
}

std::string Tokenizer::decode(const std::vector<int32_t>& ids) const {
  std::string text;
  for (const int32_t id : ids) text += decode(id);
  return text;
}

void Tokenizer::save(const std::string& folder) const {
  write_text(file_in(folder), json(), Existing::replace);
}

std::unique_ptr<Tokenizer> byte_tokenizer() {
  return std::make_unique<ByteTokenizer>();
}

std::unique_ptr<Tokenizer> make_tokenizer(const std::string& name) {
  if (name == "byte") return byte_tokenizer();
  if (name == "gpt2")
    throw UsageError("the GPT-2 tokenizer is not available yet, --tokenizer gpt2, use byte");
  throw UsageError(fmt::format("unknown tokenizer {}, --tokenizer, choose one of: byte", in_quotes(name)));
}

std::unique_ptr<Tokenizer> load_tokenizer(const std::string& folder) {
  const std::string path = file_in(folder);
  const auto fail = [&](const std::string& what) -> std::unique_ptr<Tokenizer> {
    throw RunError(fmt::format("{}, {}, use the file that 'train_gpt prepare' wrote", what, path));
  };
  const auto json = parse_json(read_text(path, "tokenizer"));
  if (!json.is_object()) return fail("the tokenizer is not a JSON object");
  const auto type = json.find("type");
  if (type == json.end() || !type->is_string()) return fail("the tokenizer has no field 'type'");
  if (*type != "byte")
    return fail(fmt::format("the tokenizer has the unknown type {}", in_quotes(type->get<std::string>())));
  auto tokenizer = byte_tokenizer();
  const auto check = [&](const char* field, int64_t expected) {
    const auto it = json.find(field);
    if (it == json.end() || !it->is_number_integer() || *it != expected)
      fail(fmt::format("field '{}' of the byte tokenizer is not {}", field, expected));
  };
  check("vocab_size", tokenizer->vocab_size());
  check("end_of_text", tokenizer->end_of_text());
  return tokenizer;
}

std::unique_ptr<Tokenizer> find_tokenizer(const std::string& pattern) {
  const std::string shard = shard_paths(pattern).front();
  const size_t slash = shard.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : shard.substr(0, slash + 1);
  struct stat info {};
  if (::stat(file_in(folder).c_str(), &info) != 0) return nullptr;
  return load_tokenizer(folder);
}
