// A folder of token shards of all kinds, for tests of data/.
#pragma once

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "data/shards.h"
#include "tests/temporary_folder.h"

/// With shards of all kinds in a temporary folder.
class Data : public ::testing::Test {
 protected:
  std::string path(const std::string& name) const { return folder_.path(name); }
  void write_file(const std::string& name, const std::string& bytes) const { folder_.write(name, bytes); }
  std::string read_file(const std::string& name) const { return folder_.read(name); }
  // A shard from raw parts, so that each can be wrong.
  void raw_shard(const std::string& name, int32_t magic, int32_t version, int32_t count,
                 size_t body_bytes) const {
    std::string bytes(1024, '\0');
    const int32_t header[3] = {magic, version, count};
    std::memcpy(bytes.data(), header, sizeof header);
    write_file(name, bytes + std::string(body_bytes, '\1'));
  }
  void shard(const std::string& name, const std::vector<uint16_t>& ids) const {
    ShardWriter writer(path(name));
    writer.write(ids);
    writer.finish();
  }
  // Shards of these sizes that together hold 0, 1, 2, ... (mod 50000).
  void counting_shards(const std::vector<int>& sizes) const {
    int next = 0;
    for (size_t s = 0; s < sizes.size(); ++s) {
      std::vector<uint16_t> ids;
      for (int i = 0; i < sizes[s]; ++i) ids.push_back(static_cast<uint16_t>(next++ % 50000));
      shard(fmt::format("count_{:03}.bin", s), ids);
    }
  }
  Shards counting(const std::vector<int>& sizes) const {
    counting_shards(sizes);
    return {path("count_*.bin"), kAnyVocabulary};
  }
  TemporaryFolder folder_;
};
