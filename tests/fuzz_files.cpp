// Fuzzing of everything that parses a file or a flag: fuzz_files [SECONDS] [SEED]
//
// Valid inputs are damaged (bytes flipped, blocks moved, numbers replaced, parts cut) and parsed. The parser
// may succeed, or throw UsageError or RunError with one line of text; anything else ends the program with
// status 1 and leaves the input in fuzz_failure.bin. Built with the address and undefined-behaviour
// sanitizers by `make check`. A seed gives the same inputs each time.
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "data/loader.h"
#include "data/prepare.h"
#include "data/shards.h"
#include "data/tokenizer.h"
#include "error.h"
#include "files.h"
#include "keyed.h"
#include "model/checkpoint.h"

namespace fs = std::filesystem;

namespace {

class Mutator {
 public:
  explicit Mutator(uint64_t seed) : random_(seed) {}

  size_t below(size_t n) { return n == 0 ? 0 : random_() % n; }

  /// A damaged copy: one to eight changes.
  std::string damage(std::string text, const std::vector<std::string>& words) {
    for (size_t changes = 1 + below(below(8) + 1); changes > 0; --changes) change(text, words);
    return text;
  }

 private:
  void change(std::string& text, const std::vector<std::string>& words) {
    const size_t at = below(text.size() + 1);
    const size_t n = std::min(below(below(64) + 1), text.size() - at);
    switch (below(9)) {
      case 0:
        if (at < text.size()) text[at] ^= static_cast<char>(1 << below(8));
        break;
      case 1:
        if (at < text.size()) text[at] = static_cast<char>(below(256));
        break;
      case 2:
        text.erase(at, n);
        break;
      case 3:
        text.insert(at, text.substr(below(text.size() + 1), n));
        break;
      case 4:
        text.resize(at);
        break;  // truncated
      case 5:
        text.append(n, static_cast<char>(below(256)));
        break;  // longer
      case 6:
        text.insert(at, words[below(words.size())]);
        break;
      case 7:
        replace_number(text, at);
        break;
      default:
        replace_word(text, at);
        break;  // a 32-bit field of a binary header
    }
  }
  // The next decimal number of a JSON or option text becomes another one.
  void replace_number(std::string& text, size_t at) {
    const size_t begin = text.find_first_of("0123456789", at);
    if (begin == std::string::npos) return;
    const size_t end = std::min(text.find_first_not_of("0123456789", begin), text.size());
    static const char* const kNumbers[] = {"0",
                                           "1",
                                           "-1",
                                           "7",
                                           "255",
                                           "65536",
                                           "2147483647",
                                           "2147483648",
                                           "4294967295",
                                           "4294967296",
                                           "9223372036854775807",
                                           "9223372036854775808",
                                           "18446744073709551615",
                                           "18446744073709551616",
                                           "1e400",
                                           "0.5",
                                           "null",
                                           "[]"};
    text.replace(begin, end - begin, kNumbers[below(std::size(kNumbers))]);
  }
  void replace_word(std::string& text, size_t at) {
    at = at / 4 * 4 % 1024;
    if (at + 4 > text.size()) return;
    static const uint32_t kWords[] = {0, 1, 2, 0x7fffffff, 0x80000000, 0xffffffff, 0xfffffff8, 256};
    const uint32_t word = kWords[below(std::size(kWords))];
    std::memcpy(text.data() + at, &word, 4);
  }
  std::mt19937_64 random_;
};

/// One kind of input: valid examples, what to insert, and the parser.
struct Target {
  const char* name;
  std::vector<std::string> seeds;
  std::vector<std::string> words;
  std::function<void(const std::string&)> parse;
  int64_t accepted = 0, refused = 0;
};

ModelConfig tiny() {
  return {.name = "gpt2", .L = 1, .NH = 2, .C = 4, .positions = 3, .V = 9};
}

std::string file_of(const std::string& path) {
  return read_text(path, "seed");
}

// Each parser reads a file below `folder`, as the program does.
std::vector<Target> make_targets(const std::string& folder, Context& ctx) {
  const std::vector<std::string> json_words{
      "{",       "}",           "[",        "]",       "\"",      ":",
      ",",       "null",        "true",     "1e999",   "\\ud800", "\xff",
      "{\"a\":", "\"shape\":[", "\"w\":{}", "\\u0000", "-0",      std::string(300, '[')};
  std::vector<Target> targets;
  const auto write = [folder](const std::string& name, const std::string& bytes) {
    write_text(folder + "/" + name, bytes, Existing::replace);
    return folder + "/" + name;
  };

  {
    ShardWriter shard(folder + "/seed.bin");
    const std::vector<uint16_t> ids{256, 1, 2, 3, 4, 255, 0, 256, 9, 8, 7, 6};
    shard.write(ids);
    shard.finish();
  }
  targets.push_back({"token shard",
                     {file_of(folder + "/seed.bin")},
                     {std::string(2, '\xff')},
                     [=](const std::string& bytes) {
                       const Shards shards(write("in.bin", bytes), 257);
                       const Loader loader(shards, {.rows = 2, .T = 3});
                       std::vector<int32_t> inputs(6), targets(6);
                       for (int64_t step = 0; step < 3; ++step)
                         loader.fill(step, 0, 2, inputs.data(), targets.data());
                       shards.fingerprint();
                     }});

  // A checkpoint of a tiny model, whose files are damaged one at a time.
  ParameterTable parameters(tiny());
  parameters.allocate(ctx, false);
  parameters.initialize(1);
  float moments[4] = {1, 2, 3, 4};
  const std::vector<NamedTensor> optimizer{{"wte.weight.m", Tensor(moments, {2, 2}), true}};
  const std::string checkpoint = save_checkpoint({.out = folder,
                                                  .step = 3,
                                                  .config = tiny(),
                                                  .parameters = parameters,
                                                  .optimizer = optimizer,
                                                  .state = {{"step", 3}, {"tokens", 1.5}},
                                                  .tokenizer = byte_tokenizer()->json()});
  const auto file_target = [&](const char* name, const std::string& file,
                               const std::function<void()>& parse) {
    targets.push_back({name, {file_of(checkpoint + "/" + file)}, json_words, [=](const std::string& bytes) {
                         write_text(checkpoint + "/" + file, bytes, Existing::replace);
                         newest_checkpoint(folder);
                         parse();
                       }});
  };
  const auto load_model = [checkpoint, &ctx] {
    const ModelConfig config = load_config(checkpoint);
    if (config.L * config.C * (config.V + config.positions + config.C) > 1'000'000)
      return;  // legal, but large
    ParameterTable loaded(config);
    loaded.allocate(ctx, false);
    load_parameters(checkpoint, loaded);
  };
  file_target("model.safetensors", "model.safetensors", load_model);
  file_target("config.json", "config.json", load_model);
  file_target("optimizer.safetensors", "optimizer.safetensors", [checkpoint] {
    float values[4];
    load_optimizer(checkpoint, std::vector<NamedTensor>{{"wte.weight.m", Tensor(values, {2, 2}), true}});
  });
  file_target("state.json", "state.json", [checkpoint] { load_state(checkpoint); });
  file_target("tokenizer.json", "tokenizer.json",
              [checkpoint] { load_tokenizer(checkpoint)->encode("text"); });

  targets.push_back(
      {"text for prepare",
       {"one\n<|endoftext|>\ntwo\r\n<|endoftext|>\r\n\nthree\n", "a", "no line break", "\n\n<|endoftext|>"},
       {"<|endoftext|>", "\n<|endoftext|>\n", "\r\n", "\n"},
       [=](const std::string& bytes) {
         prepare({.texts = {write("in.txt", bytes)},
                  .out = folder + "/shards",
                  .val_fraction = 0.3,
                  .shard_tokens = 7,
                  .threads = 1});
       }});
  targets.push_back({"manifest of prepare", {}, json_words, [=](const std::string& bytes) {
                       write("listed/prepare.json", bytes);
                       const PrepareOptions options{.texts = {write("in.txt", "text\nmore text\n")},
                                                    .out = folder + "/listed"};
                       is_prepared(options);
                       prepare(options);
                     }});
  prepare({.texts = {write("in.txt", "text\nmore text\n")}, .out = folder + "/listed"});
  targets.back().seeds.push_back(file_of(folder + "/listed/prepare.json"));

  targets.push_back(
      {"options",
       {"muon:lr=0.02,momentum=0.95", "adam:lr=0.3,beta1=0.8,beta2=0.95,steps=5,kind=a,on=1", "x"},
       {":", "=", ",", "lr=", "nan", "inf", "-", "0x1p3", "1e999", std::string(1, '\0')},
       [](const std::string& text) {
         Keyed keyed("--hidden", text);
         static constexpr const char* kKinds[] = {"a", "b"};
         keyed.number("lr", 0.1, 0, 10);
         keyed.number("momentum", 0.1, 0, 1);
         keyed.number("beta1", 0.1, 0, 1);
         keyed.number("beta2", 0.1, 0, 1);
         keyed.integer("steps", 1, 0, 100);
         keyed.choice("kind", "a", kKinds);
         keyed.boolean("on", false);
         keyed.finish();
       }});
  targets.push_back({"--model",
                     {"gpt2-mini:layers=4,channels=384", "gpt2:heads=4,positions=64"},
                     {":", "=", ",", "layers=", "heads=0", "-1"},
                     [](const std::string& text) { parse_model(text); }});
  return targets;
}

// False when the parser broke the rule.
bool run_one(Target& target, const std::string& input) {
  const char* broken = nullptr;
  std::string what;
  try {
    target.parse(input);
    ++target.accepted;
  } catch (const UsageError& error) {
    what = error.what();
    ++target.refused;
  } catch (const RunError& error) {
    what = error.what();
    ++target.refused;
  } catch (const std::exception& error) {
    what = error.what();
    broken = "another exception";
  }
  // Option texts come from the user's own command line, line breaks included; files must not make more lines.
  const bool from_file = std::strcmp(target.name, "options") != 0 && std::strcmp(target.name, "--model") != 0;
  if (!broken && from_file && what.find('\n') != std::string::npos) broken = "a message of several lines";
  if (!broken) return true;
  std::FILE* file = std::fopen("fuzz_failure.bin", "wb");
  if (file) {
    std::fwrite(input.data(), 1, input.size(), file);
    std::fclose(file);
  }
  std::fprintf(stderr, "fuzz_files: %s from the parser of %s: %s (input in fuzz_failure.bin)\n", broken,
               target.name, what.c_str());
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 10;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const fs::path memory = "/dev/shm";  // no disk, no waiting for it
  const fs::path parent = fs::exists(memory) ? memory : fs::temp_directory_path();
  const std::string folder = (parent / fmt::format("anthology_fuzz_{}", ::getpid())).string();
  fs::remove_all(folder);
  make_folder(folder);

  Context ctx;
  use_cpu(ctx, 1);
  std::vector<Target> targets = make_targets(folder, ctx);
  Mutator mutator(seed);
  bool ok = true;
  const auto start = std::chrono::steady_clock::now();
  // Each target gets its share of the time; a valid input must be accepted before and after.
  for (size_t t = 0; t < targets.size() && ok; ++t) {
    Target& target = targets[t];
    const double until = seconds * static_cast<double>(t + 1) / static_cast<double>(targets.size());
    ok = run_one(target, target.seeds[0]) && target.accepted == 1;
    if (!ok) std::fprintf(stderr, "fuzz_files: the valid %s was not accepted\n", target.name);
    while (ok && std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < until)
      ok = run_one(target, mutator.damage(target.seeds[mutator.below(target.seeds.size())], target.words));
    if (ok) ok = run_one(target, target.seeds[0]);
    std::printf("fuzz_files: %-24s %8ld accepted %8ld refused\n", target.name,
                static_cast<long>(target.accepted), static_cast<long>(target.refused));
  }
  fs::remove_all(folder);
  std::printf("fuzz_files: seed %llu, %s\n", static_cast<unsigned long long>(seed), ok ? "passed" : "FAILED");
  return ok ? 0 : 1;
}
