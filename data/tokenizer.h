// Text to token ids and back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

/// Immutable after construction, so that many threads may share one.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  virtual std::string name() const = 0;     // as on the command line: "byte"
  virtual int64_t vocab_size() const = 0;   // at most 65536, the limit of shards
  virtual int32_t end_of_text() const = 0;  // the id between documents
  /// Appends the ids of `text`. Any bytes are legal; no text makes end_of_text().
  virtual void encode(std::string_view text, std::vector<uint16_t>& ids) const = 0;
  /// The bytes of one id; empty for end_of_text(). RunError for an id outside the vocabulary.
  virtual std::string_view decode(int32_t id) const = 0;
  /// The largest position p <= `at` where `text` may be cut: encode(text) = encode(before) + encode(after).
  /// 0 when there is none. Lets pieces of one document be encoded in parallel.
  virtual size_t cut(std::string_view text, size_t at) const = 0;
  /// The text of FOLDER/tokenizer.json: all that load_tokenizer() needs.
  virtual std::string json() const = 0;

  /// The ids of a text, for callers who want them by value.
  std::vector<int32_t> encode(std::string_view text) const;
  /// The text of ids.
  std::string decode(const std::vector<int32_t>& ids) const;
  /// Writes FOLDER/tokenizer.json, atomically, replacing what is there.
  void save(const std::string& folder) const;
};

/// Ids 0 to 255 are bytes, 256 is end of text.
std::unique_ptr<Tokenizer> byte_tokenizer();
/// By the name given to --tokenizer. UsageError that lists the names.
std::unique_ptr<Tokenizer> make_tokenizer(const std::string& name);
/// Reads FOLDER/tokenizer.json. RunError names file and field.
std::unique_ptr<Tokenizer> load_tokenizer(const std::string& folder);
/// The tokenizer.json beside the (first of the) shards of a pattern, or null when there is none (shards from
/// elsewhere). RunError when there are no shards.
std::unique_ptr<Tokenizer> find_tokenizer(const std::string& pattern);
