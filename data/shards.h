// Token shards: the format of llm.c and modded-nanogpt. A file is 256 little-endian int32 (magic 20240520,
// version 1, count, zeros), then `count` little-endian uint16 token ids, and nothing else.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "files.h"

inline constexpr int32_t kShardMagic = 20240520;
inline constexpr int32_t kShardVersion = 1;
inline constexpr int64_t kShardHeaderBytes = 256 * 4;
inline constexpr int64_t kShardMaxTokens = INT32_MAX;  // the count in the header is an int32
inline constexpr int64_t kAnyVocabulary = 65536;       // every uint16 is legal

/// The files that a file name or a glob ("data/train_*.bin") stands for, sorted; RunError when there is none.
std::vector<std::string> shard_paths(const std::string& pattern);

/// All shards that match a pattern, in sorted order, as one stream of token ids. Memory-mapped: opening reads
/// the headers only. Thread-safe after construction (nothing changes).
class Shards {
 public:
  /// `pattern` as for shard_paths. Ids >= `vocab_size` are an error when they are
  /// copied. Throws RunError: no match, not a shard, truncated; it names the file and the field.
  Shards(const std::string& pattern, int64_t vocab_size);

  /// Tokens of all shards together.
  int64_t size() const { return starts_.back(); }
  int64_t vocab_size() const { return vocab_size_; }
  const std::string& pattern() const { return pattern_; }
  /// File names, in the order of the stream.
  std::vector<std::string> paths() const;
  /// out[i] = token start + i. RunError names shard and position of an id outside the vocabulary.
  void copy(int64_t start, int64_t count, int32_t* out) const;
  /// Asks the system to bring tokens [start, start + count) into memory; returns at once; clips to the
  /// stream.
  void read_ahead(int64_t start, int64_t count) const;
  /// A hash of the counts and of sampled tokens: says in a checkpoint which data it was trained on.
  uint64_t fingerprint() const;

 private:
  int64_t shard_of(int64_t token) const;  // the shard that holds it
  std::string pattern_;
  int64_t vocab_size_;
  std::vector<MappedFile> files_;
  std::vector<int64_t> starts_;  // first token of each shard, and the total at the end
};

/// One shard under construction; see FileWriter. Nothing appears under `path` before finish().
class ShardWriter {
 public:
  explicit ShardWriter(const std::string& path, Existing existing = Existing::refuse);
  /// Appends ids; throws RunError when the disk is full. At most kShardMaxTokens in all.
  void write(std::span<const uint16_t> ids);
  /// Tokens so far.
  int64_t size() const { return count_; }
  /// Completes header and file.
  void finish();

 private:
  FileWriter file_;
  int64_t count_ = 0;
};
