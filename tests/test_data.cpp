// data/: token shards and the loader's contract.
#include <algorithm>
#include <cstring>
#include <filesystem>
#include <set>

#include "data/loader.h"
#include "error.h"
#include "model/kernels/tensor.h"
#include "tests/data_fixture.h"

namespace fs = std::filesystem;

namespace {

// ---- Shards

TEST_F(Data, ShardHasTheDocumentedBytes) {
  shard("a.bin", {7, 65535, 258});
  const std::string bytes = read_file("a.bin");
  ASSERT_EQ(bytes.size(), 1024u + 6);
  const unsigned char header[] = {0x88, 0xd8, 0x34, 0x01, 1, 0, 0, 0, 3, 0, 0, 0};  // 20240520, 1, 3
  EXPECT_EQ(std::memcmp(bytes.data(), header, sizeof header), 0);
  EXPECT_EQ(bytes.find_first_not_of('\0', 12), 1024u);
  EXPECT_EQ(bytes.substr(1024), std::string("\x07\x00\xff\xff\x02\x01", 6));
}

TEST_F(Data, ShardsFormOneStreamAcrossBoundaries) {
  const Shards shards = counting({5, 1, 0, 11, 0});
  ASSERT_EQ(shards.size(), 17);
  for (int64_t start = 0; start <= 17; ++start)
    for (int64_t count = 0; start + count <= 17; ++count) {
      std::vector<int32_t> got(static_cast<size_t>(count) + 1, -5);
      shards.copy(start, count, got.data());
      for (int64_t i = 0; i < count; ++i) ASSERT_EQ(got[static_cast<size_t>(i)], start + i);
      ASSERT_EQ(got.back(), -5);  // nothing beyond the end
      shards.read_ahead(start, count + 100);
    }
  int32_t one = 0;
  EXPECT_THROW(shards.copy(17, 1, &one), ShapeError);
  EXPECT_THROW(shards.copy(-1, 1, &one), ShapeError);
  EXPECT_THROW(shards.copy(1, INT64_MAX, &one), ShapeError);
}

TEST_F(Data, ShardOrderIsByNameAndPatternsMayBeLiteral) {
  shard("x_10.bin", {3});
  shard("x_09.bin", {2});
  shard("x_[1].bin", {9});
  const Shards shards(path("x_?*.bin"), 10);
  std::vector<int32_t> got(3);
  shards.copy(0, 3, got.data());
  EXPECT_EQ(got, (std::vector<int32_t>{2, 3, 9}));
  EXPECT_EQ(Shards(path("x_[1].bin"), 10).paths().size(), 1u);
}

TEST_F(Data, EveryBrokenShardIsOneClearError) {
  const auto open = [&](const std::string& pattern) { Shards(path(pattern), 300); };
  expect_error<RunError>([&] { open("none_*.bin"); }, {"no token shard matches", "none_*.bin"});
  expect_error<RunError>([&] { open("missing.bin"); }, {"missing.bin"});
  write_file("empty.bin", "");
  expect_error<RunError>([&] { open("empty.bin"); }, {"empty.bin", "0 bytes", "header"});
  write_file("short.bin", std::string(1023, '\0'));
  expect_error<RunError>([&] { open("short.bin"); }, {"short.bin", "1023 bytes"});
  raw_shard("magic.bin", 20240801, 1, 4, 8);
  expect_error<RunError>([&] { open("magic.bin"); }, {"magic.bin", "magic 20240801", "20240520"});
  raw_shard("version.bin", kShardMagic, 7, 4, 8);
  expect_error<RunError>([&] { open("version.bin"); }, {"version.bin", "version 7"});
  raw_shard("negative.bin", kShardMagic, 1, -4, 8);
  expect_error<RunError>([&] { open("negative.bin"); }, {"negative.bin", "count -4"});
  raw_shard("truncated.bin", kShardMagic, 1, 4, 7);
  expect_error<RunError>([&] { open("truncated.bin"); }, {"truncated.bin", "count 4", "1032 bytes", "1031"});
  raw_shard("longer.bin", kShardMagic, 1, 4, 9);
  expect_error<RunError>([&] { open("longer.bin"); }, {"longer.bin", "1033"});
  raw_shard("huge.bin", kShardMagic, 1, INT32_MAX, 8);
  expect_error<RunError>([&] { open("huge.bin"); }, {"huge.bin", "count 2147483647"});
  fs::create_directory(path("folder.bin"));
  expect_error<RunError>([&] { open("folder.bin"); }, {"folder.bin", "not a regular file"});
  ASSERT_EQ(::mkfifo(path("pipe.bin").c_str(), 0600), 0);
  expect_error<RunError>([&] { open("pipe.bin"); }, {"pipe.bin", "not a regular file"});
}

TEST_F(Data, IdsOutsideOfTheVocabularyAreNamed) {
  shard("v_0.bin", {1, 2, 3});
  shard("v_1.bin", {4, 299, 300, 5});
  const Shards shards(path("v_*.bin"), 300);
  std::vector<int32_t> got(7);
  shards.copy(0, 5, got.data());
  expect_error<RunError>([&] { shards.copy(0, 7, got.data()); }, {"v_1.bin", "id 300", "position 2", "300"});
}

TEST_F(Data, ShardWriterNeverOverwrites) {
  write_file("mine.bin", "precious");
  expect_error<RunError>([&] { ShardWriter writer(path("mine.bin")); },
                         {"mine.bin", "nothing is overwritten"});
  ShardWriter late(path("late.bin"));
  write_file("late.bin", "came meanwhile");
  expect_error<RunError>([&] { late.finish(); }, {"late.bin"});
  EXPECT_EQ(read_file("late.bin"), "came meanwhile");
  { const ShardWriter abandoned(path("abandoned.bin")); }
  EXPECT_FALSE(fs::exists(path("abandoned.bin")));
  EXPECT_FALSE(fs::exists(path("abandoned.bin.tmp")));
  ShardWriter first(path("both.bin"));
  expect_error<RunError>([&] { ShardWriter second(path("both.bin")); }, {"both.bin", "another process"});
}

TEST_F(Data, FingerprintSeesCountsAndTokens) {
  const uint64_t a = counting({40, 60}).fingerprint();
  EXPECT_EQ(a, Shards(path("count_*.bin"), kAnyVocabulary).fingerprint());
  EXPECT_NE(a, Shards(path("count_000.bin"), kAnyVocabulary).fingerprint());
  shard("other.bin", std::vector<uint16_t>(40, 3));
  EXPECT_NE(Shards(path("other.bin"), 4).fingerprint(),
            Shards(path("count_000.bin"), kAnyVocabulary).fingerprint());
}

// ---- Loader

struct Rows {
  std::vector<int32_t> inputs, targets;
  bool operator==(const Rows&) const = default;
};

Rows fill(const Loader& loader, int64_t step, int64_t first, int64_t rows) {
  const auto n = static_cast<size_t>(rows * loader.options().T);
  Rows out{std::vector<int32_t>(n), std::vector<int32_t>(n)};
  loader.fill(step, first, rows, out.inputs.data(), out.targets.data());
  return out;
}

TEST_F(Data, BatchesAreInOrderAndStartOver) {
  const Shards shards = counting({13, 1, 20, 3});  // 37 tokens
  const Loader loader(shards, {.rows = 3, .T = 4});
  EXPECT_EQ(loader.batches_per_epoch(), 3);  // 36 / 12, the 37th is the last target
  EXPECT_EQ(loader.chunks(), 9);
  for (const int64_t step : std::vector<int64_t>{0, 1, 2, 3, 4, 3'000'000'000'000}) {
    const Rows got = fill(loader, step, 0, 3);
    for (int64_t i = 0; i < 12; ++i) {
      ASSERT_EQ(got.inputs[static_cast<size_t>(i)], step % 3 * 12 + i);
      ASSERT_EQ(got.targets[static_cast<size_t>(i)], step % 3 * 12 + i + 1);
    }
  }
  // One token fewer: the last batch would lack its last target.
  counting_shards({});
  shard("less.bin", std::vector<uint16_t>(36, 1));
  EXPECT_EQ(Loader(Shards(path("less.bin"), 2), {.rows = 3, .T = 4}).batches_per_epoch(), 2);
}

TEST_F(Data, TheSplitOfABatchNeverChangesItsData) {
  const Shards shards = counting({100, 77, 30});
  for (const bool shuffle : {false, true}) {
    const Loader loader(shards, {.rows = 6, .T = 5, .shuffle = shuffle, .seed = 3});
    for (int64_t step = 0; step < 20; ++step) {
      const Rows whole = fill(loader, step, 0, 6);
      for (const int64_t part : std::vector<int64_t>{1, 2, 3}) {
        Rows joined;
        for (int64_t first = 0; first < 6; first += part) {
          const Rows piece = fill(loader, step, first, part);
          joined.inputs.insert(joined.inputs.end(), piece.inputs.begin(), piece.inputs.end());
          joined.targets.insert(joined.targets.end(), piece.targets.begin(), piece.targets.end());
        }
        ASSERT_EQ(joined, whole) << "step " << step << " in parts of " << part;
      }
    }
  }
}

TEST_F(Data, ShuffledEpochsHoldEveryChunkOnceInAnotherOrder) {
  const Shards shards = counting({100, 77, 30});  // 207 tokens: 41 chunks of 5
  const Loader loader(shards, {.rows = 4, .T = 5, .shuffle = true, .seed = 3});
  const Loader other_batch(shards, {.rows = 1, .T = 5, .shuffle = true, .seed = 3});
  const Loader other_seed(shards, {.rows = 1, .T = 5, .shuffle = true, .seed = 4});
  std::vector<int32_t> order;  // first tokens of the rows of three epochs
  for (int64_t j = 0; j < 3 * 41; ++j) {
    const Rows row = fill(loader, j / 4, j % 4, 1);
    for (size_t i = 0; i < 5; ++i) {
      ASSERT_EQ(row.inputs[i], row.inputs[0] + static_cast<int32_t>(i));
      ASSERT_EQ(row.targets[i], row.inputs[i] + 1);
    }
    ASSERT_EQ(row, fill(other_batch, j, 0, 1));
    order.push_back(row.inputs[0]);
  }
  for (const int epoch : {0, 1, 2}) {
    const auto begin = order.begin() + epoch * 41;
    const std::set<int32_t> seen(begin, begin + 41);
    EXPECT_EQ(seen.size(), 41u);
    EXPECT_EQ(*seen.rbegin(), 200);
    EXPECT_FALSE(std::is_sorted(begin, begin + 41));
  }
  EXPECT_FALSE(std::equal(order.begin(), order.begin() + 41, order.begin() + 41));
  int same = 0;
  for (int64_t j = 0; j < 41; ++j)
    same += fill(other_seed, j, 0, 1).inputs[0] == order[static_cast<size_t>(j)];
  EXPECT_LT(same, 10);
}

TEST(Permute, IsABijectionOfEverySize) {
  for (int64_t size = 1; size <= 300; ++size)
    for (const uint64_t key : {uint64_t{0}, uint64_t{1}, ~uint64_t{0}}) {
      std::vector<bool> hit(static_cast<size_t>(size));
      for (int64_t i = 0; i < size; ++i) {
        const int64_t to = permute(i, size, key);
        ASSERT_TRUE(to >= 0 && to < size) << to;
        ASSERT_FALSE(hit[static_cast<size_t>(to)]) << size << " " << key << " " << i;
        hit[static_cast<size_t>(to)] = true;
      }
    }
  EXPECT_THROW(permute(5, 5, 0), ShapeError);
  EXPECT_LT(permute(0, INT64_MAX, 9), INT64_MAX);  // the largest domain
}

// Every element lands everywhere about equally often: chi-square over 4096 keys, 16 cells, far outside at 60.
TEST(Permute, IsUniformOverKeys) {
  for (const int index : {0, 7, 15}) {
    int counts[16] = {};
    for (uint64_t key = 0; key < 4096; ++key) ++counts[permute(index, 16, key)];
    double chi2 = 0;
    for (const int count : counts) chi2 += (count - 256.0) * (count - 256.0) / 256.0;
    EXPECT_LT(chi2, 60) << index;
  }
}

TEST_F(Data, TooFewTokensSaysHowMany) {
  const Shards shards = counting({24});
  expect_error<RunError>([&] { Loader(shards, {.rows = 3, .T = 8}); },
                         {"24 tokens", "needs 25", "count_*.bin"});
  EXPECT_EQ(Loader(shards, {.rows = 1, .T = 23}).batches_per_epoch(), 1);
  shard("zero.bin", {});
  const Shards none(path("zero.bin"), 2);
  expect_error<RunError>([&] { Loader(none, {.rows = 1, .T = 1}); }, {"0 tokens"});
}

TEST_F(Data, ChunksCoverTheDataForEvaluation) {
  const Shards shards = counting({38});
  const Loader loader(shards, {.rows = 3, .T = 4});
  std::vector<int32_t> inputs(36), targets(36);
  loader.fill_chunks(0, loader.chunks(), inputs.data(), targets.data());
  for (int32_t i = 0; i < 36; ++i) EXPECT_EQ(targets[static_cast<size_t>(i)], i + 1);
  EXPECT_THROW(loader.fill_chunks(9, 1, inputs.data(), targets.data()), ShapeError);
}

TEST_F(Data, BatchReaderGivesWhatFillGives) {
  const Shards shards = counting({100, 77, 30});
  for (const bool shuffle : {false, true}) {
    const Loader loader(shards, {.rows = 4, .T = 7, .shuffle = shuffle});
    BatchReader reader(loader, 5, 1, 2);
    for (int64_t step = 5; step < 60; ++step) {
      EXPECT_EQ(reader.step(), step);
      const BatchReader::Batch batch = reader.next();
      if (step % 7 == 0) ::usleep(2000);  // time for the thread to run ahead, which must not touch this batch
      const Rows expected = fill(loader, step, 1, 2);
      ASSERT_TRUE(std::equal(expected.inputs.begin(), expected.inputs.end(), batch.inputs)) << step;
      ASSERT_TRUE(std::equal(expected.targets.begin(), expected.targets.end(), batch.targets)) << step;
    }
  }
  const Loader loader(shards, {.rows = 4, .T = 7});
  for (int i = 0; i < 50; ++i) BatchReader(loader, i);  // ends at once, whatever the thread is doing
}

TEST_F(Data, BatchReaderReportsABadTokenAtItsStep) {
  std::vector<uint16_t> ids(40, 3);
  ids[25] = 9;
  shard("bad.bin", ids);
  const Shards shards(path("bad.bin"), 4);
  const Loader loader(shards, {.rows = 2, .T = 4});
  BatchReader reader(loader, 0);
  for (int step = 0; step < 3; ++step) EXPECT_EQ(reader.next().inputs[0], 3);  // targets end at token 24
  for (int again = 0; again < 2; ++again)
    expect_error<RunError>([&] { reader.next(); }, {"bad.bin", "id 9", "position 25"});
}

}  // namespace
