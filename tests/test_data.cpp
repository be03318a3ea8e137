// data/: token shards, the loader's contract, tokenizers, text preparation.
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <random>
#include <set>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "data/loader.h"
#include "data/prepare.h"
#include "data/shards.h"
#include "data/tokenizer.h"
#include "error.h"
#include "model/kernels/tensor.h"
#include "tests/temporary_folder.h"

namespace fs = std::filesystem;

namespace {

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

// ---- Tokenizer

TEST_F(Data, ByteTokenizerRoundTrip) {
  const auto tokenizer = make_tokenizer("byte");
  std::string all;
  for (int i = 0; i < 256; ++i) all += static_cast<char>(i);
  std::vector<int32_t> ids = tokenizer->encode(all);
  std::vector<int32_t> expected(256);
  std::iota(expected.begin(), expected.end(), 0);
  EXPECT_EQ(ids, expected);
  ids.push_back(tokenizer->end_of_text());
  EXPECT_EQ(tokenizer->decode(ids), all);
  EXPECT_EQ(tokenizer->vocab_size(), 257);
  EXPECT_EQ(tokenizer->encode("<|endoftext|>").size(), 13u);  // text never makes the special id
  EXPECT_THROW(tokenizer->decode(257), RunError);
  EXPECT_THROW(tokenizer->decode(-1), RunError);
}

TEST_F(Data, TokenizerFiles) {
  const auto tokenizer = make_tokenizer("byte");
  tokenizer->save(folder_.path());
  EXPECT_EQ(read_file("tokenizer.json"), "{\"type\":\"byte\",\"vocab_size\":257,\"end_of_text\":256}\n");
  EXPECT_EQ(load_tokenizer(folder_.path())->name(), "byte");
  shard("t.bin", {1});
  EXPECT_EQ(find_tokenizer(path("*.bin"))->name(), "byte");
  for (const auto& [text, part] : std::vector<std::pair<std::string, std::string>>{
           {"", "not a JSON object"},
           {"[1]", "not a JSON object"},
           {"{\"type\":\"byte\"", "not a JSON object"},
           {"{}", "'type'"},
           {"{\"type\":3}", "'type'"},
           {"{\"type\":\"gpt\\n2\"}", "unknown type 'gpt\\x0a2'"},
           {"{\"type\":\"byte\",\"vocab_size\":256,\"end_of_text\":256}", "'vocab_size'"},
           {"{\"type\":\"byte\",\"vocab_size\":257}", "'end_of_text'"}}) {
    write_file("tokenizer.json", text);
    expect_error<RunError>([&] { load_tokenizer(folder_.path()); }, {"tokenizer.json", part});
  }
  fs::remove(path("tokenizer.json"));
  EXPECT_EQ(find_tokenizer(path("t.bin")), nullptr);
  expect_error<RunError>([&] { find_tokenizer(path("none*")); }, {"none*"});
  expect_error<RunError>([&] { load_tokenizer(folder_.path()); }, {"tokenizer.json", "No such file"});
  expect_error<UsageError>([&] { make_tokenizer("gpt2"); }, {"not available yet", "--tokenizer", "byte"});
  expect_error<UsageError>([&] { make_tokenizer("x"); }, {"'x'", "--tokenizer", "byte"});
}

// ---- Prepare

// What a folder's shards say as text, "|" for end of text.
std::string text_of(const std::string& pattern) {
  const auto tokenizer = find_tokenizer(pattern);
  const Shards shards(pattern, tokenizer->vocab_size());
  std::vector<int32_t> ids(static_cast<size_t>(shards.size()));
  shards.copy(0, shards.size(), ids.data());
  std::string text;
  for (const int32_t id : ids) text += id == tokenizer->end_of_text() ? "|" : tokenizer->decode(id);
  return text;
}

TEST_F(Data, PrepareSplitsDocumentsAndValidation) {
  write_file("a.txt",
             "one\n<|endoftext|>\ntwo\nlines\n<|endoftext|>\n\n<|endoftext|>\n a <|endoftext|> inside\n");
  write_file("b.txt", "<|endoftext|>\r\nwindows\r\n<|endoftext|>\r\nlast<|endoftext|>\n<|endoftext|>");
  const PrepareReport report =
      prepare({.texts = {path("a.txt"), path("b.txt")}, .out = path("out"), .val_fraction = 0.2});
  EXPECT_EQ(text_of(path("out/train_*.bin")), "|one|two\nlines| a <|endoftext|> inside\n|windows");
  EXPECT_EQ(text_of(path("out/val_*.bin")), "|last<|endoftext|>");
  EXPECT_EQ(report.documents, 5);
  EXPECT_EQ(report.bytes, 3 + 9 + 24 + 7 + 17);
  EXPECT_EQ(report.train_tokens, 4 + 43);
  EXPECT_EQ(report.val_tokens, 1 + 17);
  EXPECT_EQ(report.vocab_size, 257);
}

TEST_F(Data, PrepareTakesWholeDocumentsUntilTheFraction) {
  std::string text;
  for (int i = 0; i < 10; ++i) text.append(10, static_cast<char>('a' + i)).append("\n<|endoftext|>\n");
  write_file("a.txt", text);
  const auto val_of = [&](double fraction) {
    prepare({.texts = {path("a.txt")}, .out = path("out"), .val_fraction = fraction});
    return fs::exists(path("out/val_000000.bin")) ? text_of(path("out/val_*.bin")) : "";
  };
  EXPECT_EQ(val_of(0.15), "|iiiiiiiiii|jjjjjjjjjj");
  EXPECT_EQ(val_of(1e-9), "|jjjjjjjjjj");
  EXPECT_EQ(val_of(0.2), "|iiiiiiiiii|jjjjjjjjjj");
  EXPECT_EQ(val_of(0.999).size(), 9u * 11);  // training keeps a document
  EXPECT_EQ(val_of(0), "");                  // and the val shards of the last run are gone
}

TEST_F(Data, PrepareSplitsASingleDocumentAtALine) {
  std::string text;
  for (int i = 0; i < 100; ++i) text += fmt::format("line {:02}\n", i);
  write_file("a.txt", text);
  prepare({.texts = {path("a.txt")}, .out = path("out"), .val_fraction = 0.05});
  EXPECT_EQ(text_of(path("out/train_*.bin")) + text_of(path("out/val_*.bin")).substr(1), "|" + text);
  EXPECT_EQ(text_of(path("out/val_*.bin")), "|" + text.substr(95 * 8));
  write_file("b.txt", "no line break at all");
  prepare({.texts = {path("b.txt")}, .out = path("out"), .val_fraction = 0.25});
  EXPECT_EQ(text_of(path("out/val_*.bin")), "|t all");
  write_file("c.txt", "xy");
  prepare({.texts = {path("c.txt")}, .out = path("out")});
  EXPECT_EQ(text_of(path("out/train_*.bin")) + text_of(path("out/val_*.bin")), "|x|y");
  write_file("d.txt", "x");
  expect_error<RunError>([&] { prepare({.texts = {path("d.txt")}, .out = path("out")}); },
                         {"d.txt", "--val-fraction 0"});
  EXPECT_EQ(text_of(path("out/train_*.bin")), "|x");  // the older result is intact
}

TEST_F(Data, PrepareIsTheSameForAnyThreadsAndShards) {
  std::mt19937 random(5);
  std::string text;
  for (int document = 0; document < 40; ++document) {  // sizes from bytes to several pieces
    const size_t size = document % 10 == 0 ? 3'000'000 : random() % 5000 + 1;
    for (size_t i = 0; i < size; ++i) text += static_cast<char>(random() % 256);
    text += "\n<|endoftext|>\n";
  }
  write_file("a.txt", text);
  double last = -1;
  const PrepareOptions one{.texts = {path("a.txt")}, .out = path("one"), .val_fraction = 0.3, .threads = 1};
  prepare(one, [&](double fraction, double rate) {
    EXPECT_GT(fraction, last);
    EXPECT_GT(rate, 0);
    last = fraction;
  });
  EXPECT_DOUBLE_EQ(last, 1);
  const PrepareReport report = prepare({.texts = {path("a.txt")},
                                        .out = path("many"),
                                        .val_fraction = 0.3,
                                        .shard_tokens = 1'034'567,
                                        .threads = 5});
  EXPECT_GT(report.train_shards, 5);
  for (const char* kind : {"train", "val"}) {
    const Shards a(path(fmt::format("one/{}_*.bin", kind)), 257),
        b(path(fmt::format("many/{}_*.bin", kind)), 257);
    ASSERT_EQ(a.size(), b.size());
    std::vector<int32_t> x(static_cast<size_t>(a.size())), y(x);
    a.copy(0, a.size(), x.data());
    b.copy(0, b.size(), y.data());
    EXPECT_EQ(x, y);
  }
  for (int i = 0; i < report.train_shards - 1; ++i)
    EXPECT_EQ(Shards(path(fmt::format("many/train_{:06}.bin", i)), 257).size(), 1'034'567);
}

TEST_F(Data, PrepareReplacesItsOwnFilesOnly) {
  write_file("a.txt", "some text\nand more\n");
  const PrepareOptions options{.texts = {path("a.txt")}, .out = path("out")};
  PrepareOptions fine = options;
  fine.shard_tokens = 4;
  EXPECT_FALSE(is_prepared(fine));
  prepare(fine);
  EXPECT_TRUE(is_prepared(fine));
  EXPECT_FALSE(is_prepared(options));
  EXPECT_TRUE(fs::exists(path("out/train_000001.bin")));
  prepare(options);
  EXPECT_FALSE(fs::exists(path("out/train_000001.bin")));  // the longer series is gone
  EXPECT_TRUE(is_prepared(options));
  write_file("a.txt", "another text\nand more\n");
  EXPECT_FALSE(is_prepared(options));
  prepare(options);
  EXPECT_EQ(text_of(path("out/train_*.bin")), "|another text\n");

  fs::copy(path("out/train_000000.bin"), path("out/train_000007.bin"));
  expect_error<RunError>([&] { prepare(options); }, {"out/train_000007.bin", "did not make"});
  EXPECT_EQ(text_of(path("out/train_000000.bin")), "|another text\n");
  fs::remove(path("out/train_000007.bin"));
  fs::remove(path("out/prepare.json"));  // then everything there is somebody else's
  expect_error<RunError>([&] { prepare(options); }, {"did not make", "--out"});
  write_file("out/prepare.json", "{\"my\": \"own\"}");
  expect_error<RunError>([&] { prepare(options); }, {"prepare.json"});
}

TEST_F(Data, AnInterruptedPrepareIsMadeAgain) {
  write_file("a.txt", "some text\nand more\n");
  const PrepareOptions options{.texts = {path("a.txt")}, .out = path("out")};
  prepare(options);
  // As a kill between the two manifests leaves it.
  write_file("out/prepare.json", "{\"type\": \"anthology-shards\", \"complete\": false}");
  fs::create_directory(path("out/prepare.tmp"));
  write_file("out/prepare.tmp/train_000003.bin", "half");
  fs::rename(path("out/train_000000.bin"), path("out/train_000005.bin"));
  EXPECT_FALSE(is_prepared(options));
  prepare(options);
  EXPECT_TRUE(is_prepared(options));
  EXPECT_FALSE(fs::exists(path("out/train_000005.bin")));
  EXPECT_FALSE(fs::exists(path("out/prepare.tmp")));
}

TEST_F(Data, PrepareRefusesBadInput) {
  write_file("a.txt", "text\n");
  write_file("blank.txt", " \n\n<|endoftext|>\n");
  const PrepareOptions good{.texts = {path("a.txt")}, .out = path("out")};
  const auto with = [&](auto change) {
    PrepareOptions options = good;
    change(options);
    prepare(options);
  };
  expect_error<UsageError>([&] { with([](auto& o) { o.texts.clear(); }); }, {"--text"});
  expect_error<UsageError>([&] { with([](auto& o) { o.out.clear(); }); }, {"--out"});
  expect_error<UsageError>([&] { with([](auto& o) { o.val_fraction = 1; }); }, {"--val-fraction"});
  expect_error<UsageError>([&] { with([](auto& o) { o.val_fraction = -0.1; }); }, {"--val-fraction"});
  expect_error<UsageError>([&] { with([](auto& o) { o.val_fraction = std::nan(""); }); }, {"--val-fraction"});
  expect_error<UsageError>([&] { with([](auto& o) { o.shard_tokens = 0; }); }, {"--shard-tokens"});
  expect_error<UsageError>([&] { with([](auto& o) { o.shard_tokens = int64_t{1} << 31; }); },
                           {"--shard-tokens"});
  expect_error<UsageError>([&] { with([](auto& o) { o.tokenizer = "gpt2"; }); }, {"not available yet"});
  expect_error<RunError>([&] { with([&](auto& o) { o.texts = {path("gone.txt")}; }); }, {"gone.txt"});
  EXPECT_FALSE(fs::exists(path("out")));  // none of these made anything
  expect_error<RunError>([&] { with([&](auto& o) { o.texts.push_back(path("blank.txt")); }); },
                         {"blank.txt", "empty"});
  expect_error<RunError>([&] { with([&](auto& o) { o.out = path("a.txt/x"); }); }, {"a.txt/x"});
}

TEST_F(Data, PrepareOnAFullDiskKeepsTheOldShards) {
  const std::string disk = path("disk");
  const TinyDisk tiny(disk, "256k");
  if (!tiny.mounted()) GTEST_SKIP() << "cannot mount a small disk here (needs root)";
  write_file("small.txt", "small text\nsecond line\n");
  write_file("large.txt", std::string(200'000, 'x'));
  prepare({.texts = {path("small.txt")}, .out = disk});
  expect_error<RunError>([&] { prepare({.texts = {path("large.txt")}, .out = disk}); },
                         {disk, "No space left", "free some space"});
  EXPECT_EQ(text_of(disk + "/train_*.bin"), "|small text\n");
  EXPECT_FALSE(fs::exists(disk + "/prepare.tmp"));
  EXPECT_TRUE(is_prepared({.texts = {path("small.txt")}, .out = disk}));
}

}  // namespace
