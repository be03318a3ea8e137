#include "data/shards.h"

#include <glob.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include <fmt/format.h>

#include "error.h"
#include "model/kernels/tensor.h"

static_assert(std::endian::native == std::endian::little, "files are little-endian and are read in place");

namespace {

// Checks everything that can be checked without reading the tokens; returns their number.
int64_t check_header(const MappedFile& file) {
  const auto fail = [&](const std::string& what) {
    throw RunError(fmt::format("{}, {}, make the shard again with 'train_gpt prepare'", what, file.path()));
  };
  if (file.size() < kShardHeaderBytes)
    fail(
        fmt::format("token shard has {} bytes, fewer than its header of {}", file.size(), kShardHeaderBytes));
  int32_t header[3];
  std::memcpy(header, file.data(), sizeof header);
  if (header[0] != kShardMagic) fail(fmt::format("token shard has magic {}, not {}", header[0], kShardMagic));
  if (header[1] != kShardVersion)
    fail(fmt::format("token shard has version {}, not {}", header[1], kShardVersion));
  if (header[2] < 0) fail(fmt::format("token shard has the negative count {}", header[2]));
  const int64_t expected = kShardHeaderBytes + 2 * int64_t{header[2]};
  if (file.size() != expected)
    fail(fmt::format("token shard says count {} and should have {} bytes, but has {}", header[2], expected,
                     file.size()));
  return header[2];
}

}  // namespace

std::vector<std::string> shard_paths(const std::string& pattern) {
  // A file whose own name holds a '[' is meant literally.
  struct stat info {};
  if (::stat(pattern.c_str(), &info) == 0) return {pattern};
  glob_t found{};
  const int status = ::glob(pattern.c_str(), GLOB_NOSORT, nullptr, &found);
  std::vector<std::string> paths;
  if (status == 0) paths.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);
  ::globfree(&found);
  // By bytes; glob itself would sort by locale.
  std::sort(paths.begin(), paths.end());
  if (paths.empty())
    throw RunError(fmt::format(
        "no token shard matches, {}, make shards with 'train_gpt prepare' or correct the pattern", pattern));
  return paths;
}

Shards::Shards(const std::string& pattern, int64_t vocab_size) : pattern_(pattern), vocab_size_(vocab_size) {
  expect(vocab_size > 0, "Shards: vocab_size must be positive");
  starts_.push_back(0);
  for (const std::string& path : shard_paths(pattern)) {
    files_.emplace_back(path, "token shard");
    starts_.push_back(starts_.back() + check_header(files_.back()));
  }
}

std::vector<std::string> Shards::paths() const {
  std::vector<std::string> paths;
  for (const MappedFile& file : files_) paths.push_back(file.path());
  return paths;
}

int64_t Shards::shard_of(int64_t token) const {
  // The last shard that starts at or before the token; upper_bound also steps over empty shards.
  return std::upper_bound(starts_.begin(), starts_.end(), token) - starts_.begin() - 1;
}

void Shards::copy(int64_t start, int64_t count, int32_t* out) const {
  expect(start >= 0 && count >= 0 && count <= size() - start, "Shards::copy: range outside of the stream");
  for (int64_t done = 0; done < count;) {
    const int64_t shard = shard_of(start + done);
    const int64_t first = start + done - starts_[static_cast<size_t>(shard)];
    const int64_t n = std::min(count - done, starts_[static_cast<size_t>(shard) + 1] - (start + done));
    const MappedFile& file = files_[static_cast<size_t>(shard)];
    // The header is 1024 bytes and maps start at pages, so the ids are aligned.
    const auto* ids = reinterpret_cast<const uint16_t*>(file.data() + kShardHeaderBytes) + first;
    int32_t* to = out + done;
    int32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < n; ++i) {
      to[i] = ids[i];
      largest = std::max(largest, to[i]);
    }
    if (largest >= vocab_size_) {
      const int64_t bad = std::find_if(to, to + n, [&](int32_t id) { return id >= vocab_size_; }) - to;
      throw RunError(
          fmt::format("token id {} at position {} is outside the vocabulary of {}, {}, "
                      "use the tokenizer and model that belong to this data",
                      to[bad], first + bad, vocab_size_, file.path()));
    }
    done += n;
  }
}

void Shards::read_ahead(int64_t start, int64_t count) const {
  const int64_t end = std::clamp<int64_t>(start + count, 0, size());
  for (int64_t at = std::max<int64_t>(start, 0); at < end;) {
    const auto shard = static_cast<size_t>(shard_of(at));
    const int64_t n = std::min(end, starts_[shard + 1]) - at;
    files_[shard].read_ahead(kShardHeaderBytes + 2 * (at - starts_[shard]), 2 * n);
    at += n;
  }
}

uint64_t Shards::fingerprint() const {
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a, a word at a time
  const auto add = [&](uint64_t word) { hash = (hash ^ word) * 0x100000001b3u; };
  for (const int64_t start : starts_) add(static_cast<uint64_t>(start));
  // A few hundred tokens at even distances: reads a few hundred pages at most, however large the data.
  constexpr int64_t kSamples = 256;
  for (int64_t i = 0; i < std::min(kSamples, size()); ++i) {
    const auto token = static_cast<int64_t>(static_cast<__int128>(size()) * i / std::min(kSamples, size()));
    const auto shard = static_cast<size_t>(shard_of(token));
    uint16_t id = 0;
    std::memcpy(&id, files_[shard].data() + kShardHeaderBytes + 2 * (token - starts_[shard]), sizeof id);
    add(id);
  }
  return hash;
}

ShardWriter::ShardWriter(const std::string& path, Existing existing) : file_(path, existing) {
  const std::array<int32_t, 256> header{};  // without a magic until finish()
  file_.write(header.data(), kShardHeaderBytes);
}

void ShardWriter::write(std::span<const uint16_t> ids) {
  expect(static_cast<int64_t>(ids.size()) <= kShardMaxTokens - count_,
         "ShardWriter: more than 2^31 - 1 tokens");
  file_.write(ids.data(), static_cast<int64_t>(ids.size_bytes()));
  count_ += static_cast<int64_t>(ids.size());
}

void ShardWriter::finish() {
  const int32_t header[3] = {kShardMagic, kShardVersion, static_cast<int32_t>(count_)};
  file_.rewrite(0, header, sizeof header);
  file_.commit();
}
