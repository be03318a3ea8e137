// data/: tokenizers and text preparation.
#include <filesystem>
#include <numeric>
#include <random>

#include "data/prepare.h"
#include "data/tokenizer.h"
#include "error.h"
#include "tests/data_fixture.h"

namespace fs = std::filesystem;

namespace {

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
