// The program from the outside: what a person or a script sees of ./train_gpt. Needs the binary in
// $TRAIN_GPT.
#include "random.h"
#include "tests/program_fixture.h"

namespace {
class Program : public ProgramTest {
 protected:
  Program() : ProgramTest("TRAIN_GPT") {}
};
}  // namespace

TEST_F(Program, HelpNamesEveryCommand) {
  const Result result = run({"--help"});
  EXPECT_EQ(result.status, 0);
  for (const char* command : {"prepare", "train", "generate", "evaluate", "info", "polar"}) {
    EXPECT_NE(result.out.find(command), std::string::npos) << command;
    const Result help = run({command, "--help"});
    EXPECT_EQ(help.status, 0);
    EXPECT_NE(help.out.find("--"), std::string::npos);
  }
}

TEST_F(Program, TheLogHasItsLinesInOrder) {
  prepare();
  const Result result =
      run(train("run", {"--sample-every", "6", "--sample-tokens", "20", "--checkpoint-every", "6"}));
  ASSERT_EQ(result.status, 0) << result.err;
  const std::vector<json> lines = log("run");
  EXPECT_TRUE(read(path("run/log.jsonl")).starts_with("{\"type\":\"run\""));
  EXPECT_EQ(lines[0]["options"]["batch_size"], 4);
  EXPECT_EQ(lines[0]["options"]["seed"], 1337);
  EXPECT_GT(lines[0]["parameters"], 100000);
  for (const char* key : {"device", "revision"}) EXPECT_TRUE(lines[0].contains(key));
  std::map<std::string, int> seen;
  for (const json& line : lines) {
    ++seen[line["type"]];
    if (line["type"] != "train") continue;
    for (const char* key :
         {"step", "tokens", "loss", "grad_norm", "lr", "step_ms", "tokens_per_second", "mfu"})
      EXPECT_TRUE(line[key].is_number()) << key;
    EXPECT_EQ(line["step"], seen["train"] - 1);
    EXPECT_EQ(line["tokens"], 128 * (seen["train"] - 1));
  }
  EXPECT_EQ(seen, (std::map<std::string, int>{
                      {"run", 1}, {"train", 12}, {"val", 3}, {"sample", 2}, {"checkpoint", 2}, {"end", 1}}));
  EXPECT_EQ(lines[1]["type"], "val");  // before the first step
  EXPECT_EQ(lines[1]["step"], 0);
  EXPECT_EQ(lines.back()["type"], "end");
  EXPECT_EQ(lines.back()["step"], 12);
  EXPECT_LT(lines.back()["val_loss"], 0.8 * lines[1]["loss"].get<double>());
  EXPECT_NEAR(lines[1]["loss"], std::log(257.0), 0.1);  // a fresh model knows nothing
}

TEST_F(Program, NoStepsOnlyValidates) {
  prepare();
  ASSERT_EQ(run(train("run", {"--steps", "0"})).status, 0);
  EXPECT_EQ(log("run").size(), 3u);  // run, val, end
}

TEST_F(Program, GradientAccumulationChangesNothing) {
  prepare();
  ASSERT_EQ(run(train("large", {"--recipe", "adamw"})).status, 0);
  ASSERT_EQ(run(train("small", {"--recipe", "adamw", "--batch-size", "1", "--grad-accum", "4"})).status, 0);
  const auto large = losses("large"), small = losses("small");
  ASSERT_EQ(large.size(), small.size());
  for (const auto& [key, loss] : large)
    EXPECT_NEAR(small.at(key), loss, 1e-4) << key.first << " " << key.second;
}

TEST_F(Program, ALimitOfThreadsIsALimit) {
  prepare();
  const Words words = {"--device", "cpu", "--steps", "4", "--hidden", "muon", "--vector", "adam"};
  Words one = words;
  one.insert(one.end(), {"--threads", "1"});
  ASSERT_EQ(run(train("one", one)).status, 0);
  for (const char* limit : {"OMP_THREAD_LIMIT=1", "OMP_MAX_ACTIVE_LEVELS=0"}) {
    const Result result = run(train(limit, words), {"timeout", "-s", "KILL", "60", "env", limit});
    ASSERT_EQ(result.status, 0) << result.err;
    EXPECT_NE(result.out.find("cpu, 1 thread,"), std::string::npos) << result.out;
    EXPECT_EQ(losses(limit), losses("one")) << limit;
  }
}

TEST_F(Program, ResumeEqualsTheUninterruptedRun) {
  prepare();
  ASSERT_EQ(run(train("whole", {"--shuffle"})).status, 0);
  ASSERT_EQ(run(train("parts", {"--shuffle", "--checkpoint-every", "4"})).status, 0);
  fs::remove_all(path("parts/checkpoints/step-00000012"));
  const Result resumed = run(train("parts", {"--shuffle", "--checkpoint-every", "4", "--resume"}));
  ASSERT_EQ(resumed.status, 0) << resumed.err;
  EXPECT_NE(resumed.out.find("resuming after step 8"), std::string::npos) << resumed.out;
  expect_same_checkpoint("whole", "parts", "step-00000012");
  EXPECT_EQ(losses("whole"), losses("parts"));
  // Once more: nothing is left to do but to remove what a crash in the last save would have left.
  fs::create_directory(path("parts/checkpoints/step-00000004.tmp"));
  EXPECT_EQ(run(train("parts", {"--shuffle", "--checkpoint-every", "4", "--resume"})).status, 0);
  EXPECT_EQ(losses("whole"), losses("parts"));
  EXPECT_FALSE(fs::exists(path("parts/checkpoints/step-00000004.tmp")));
}

// Step sizes that find themselves: they grow, the log shows it, and a resumed run grows the same way.
TEST_F(Program, EscapeVelocityGrowsAndResumes) {
  prepare();
  const std::map<std::string, Words> cases = {
      {"escape", {"--escape", "1e-6", "--hidden", "spectral", "--sensitivity", "h.0.*=2"}},
      {"prodigy", {"--recipe", "prodigy", "--schedule", "constant"}}};
  for (const auto& [name, more] : cases) {
    const std::string whole = name + "-whole", parts = name + "-parts";
    Words in_parts = more;
    in_parts.insert(in_parts.end(), {"--checkpoint-every", "4"});
    ASSERT_EQ(run(train(whole, more)).status, 0);
    ASSERT_EQ(run(train(parts, in_parts)).status, 0);
    fs::remove_all(path(parts + "/checkpoints/step-00000012"));
    in_parts.push_back("--resume");
    const Result resumed = run(train(parts, in_parts));
    ASSERT_EQ(resumed.status, 0) << resumed.err;
    expect_same_checkpoint(whole, parts, "step-00000012");
    EXPECT_EQ(losses(whole), losses(parts));
    std::vector<double> etas;
    for (const json& line : log(whole))
      if (line["type"] == "train") etas.push_back(line.at("eta"));
    EXPECT_TRUE(std::is_sorted(etas.begin(), etas.end()));
    EXPECT_EQ(etas.front(), 1e-6);
    EXPECT_GT(etas.back(), 1e-5) << name;
  }
}

TEST_F(Program, KillAtRandomMomentsAndResume) {
  prepare();
  const char* kills_text = std::getenv("KILLS");  // `make check` asks for many
  const int kills = kills_text != nullptr ? std::atoi(kills_text) : 6;
  const Words more = {"--steps", "60", "--checkpoint-every", "3", "--keep", "2"};
  ASSERT_EQ(run(train("whole", more)).status, 0);
  Words resume = more;
  resume.push_back("--resume");
  Random random(11);
  int died = 0;
  for (int i = 0; i < kills; ++i) {
    const pid_t child = start(train("killed", resume));
    std::this_thread::sleep_for(std::chrono::milliseconds(20 + random.bits() % 400));
    kill(child, SIGKILL);
    died += finish(child).status == 128 + SIGKILL;
  }
  EXPECT_GT(died, 0);
  const Result last = run(train("killed", resume));
  ASSERT_EQ(last.status, 0) << last.err;
  expect_same_checkpoint("whole", "killed", "step-00000060");
  EXPECT_EQ(losses("whole"), losses("killed"));
  for (const auto& entry : fs::directory_iterator(path("killed/checkpoints")))
    EXPECT_NE(entry.path().extension(), ".tmp") << entry.path();
}

TEST_F(Program, InterruptWritesACheckpointAndSaysHowToGoOn) {
  prepare();
  const pid_t child = start(train("run", {"--steps", "100000"}));
  while (read(path("run/log.jsonl")).find("\"type\":\"train\"") == std::string::npos) usleep(10000);
  kill(child, SIGINT);
  const Result result = finish(child);
  EXPECT_EQ(result.status, 130) << result.err;
  EXPECT_NE(result.out.find("--resume"), std::string::npos) << result.out;
  EXPECT_EQ(std::distance(fs::directory_iterator(path("run/checkpoints")), {}), 1);
}

TEST_F(Program, BadUsageIsOneLineAndStatus2) {
  prepare();
  expect_error({}, 2, {"--help"});
  expect_error({"dance"}, 2, {"--help"});
  expect_error({"train"}, 2, {"--train", "required"});
  expect_error(train("run", {"--steps", "-1"}), 2, {"--steps"});
  expect_error(train("run", {"--steps", "many"}), 2, {"--steps"});
  expect_error(train("run", {"--batch-size", "0"}), 2, {"--batch-size", "integer >= 1"});
  expect_error(train("run", {"--seed", "-1"}), 2, {"--seed", "integer >= 0"});
  expect_error(train("run", {"--grad-clip", "nan"}), 2, {"--grad-clip"});
  expect_error(train("run", {"--colour", "red"}), 2, {"--colour"});
  expect_error(train("run", {"--model", "gpt9"}), 2, {"gpt9", "gpt2-medium"});
  expect_error(train("run", {"--model", "gpt2:wings=2"}), 2, {"wings", "layers"});
  expect_error(train("run", {"--model", "gpt2:channels=100,heads=7"}), 2, {"100", "7"});
  expect_error(train("run", {"--seq-len", "257"}), 2, {"257", "positions"});
  expect_error(train("run", {"--hidden", "muon:lr=fast"}), 2, {"lr=fast", "--hidden"});
  expect_error(train("run", {"--hidden", "muon:speed=1"}), 2, {"speed", "momentum"});
  expect_error(train("run", {"--hidden", "magic"}), 2, {"magic", "muon", "adam"});
  expect_error(train("run", {"--vector", "muon"}), 2, {"--vector"});
  expect_error(train("run", {"--head", "adam"}), 2, {"head", "tied"});
  expect_error(train("run", {"--schedule", "zigzag"}), 2, {"zigzag", "cosine"});
  expect_error(train("run", {"--recipe", "soup"}), 2, {"soup", "adamw"});
  const char* with_cuda = std::getenv("TRAIN_GPT_GPU");
  if (with_cuda == nullptr || std::string(with_cuda) != std::getenv("TRAIN_GPT"))
    expect_error(train("run", {"--device", "cuda"}), 2, {"--device"});
  expect_error(train("run", {"--dtype", "bf16"}), 2, {"--dtype"});
  expect_error(train("run", {"--config", path("none.conf")}), 2, {"none.conf"});
  expect_error({"prepare", "--text", path("text.txt"), "--out", path("d"), "--tokenizer", "klingon"}, 2,
               {"klingon"});
  expect_error({"generate", "--model", path("x"), "--temperature", "-1"}, 2, {"--temperature"});
}

TEST_F(Program, BadFilesAreOneLineAndStatus1) {
  prepare();
  expect_error(train("run", {"--train", path("nothing_*.bin")}), 1, {"nothing_*.bin"});
  std::ofstream(path("empty.bin")).close();
  expect_error(train("run", {"--train", path("empty.bin")}), 1, {"empty.bin"});
  const std::string shard = read(path("data/train_000000.bin"));
  std::ofstream(path("short.bin")) << shard.substr(0, shard.size() - 2);
  expect_error(train("run", {"--val", path("short.bin")}), 1, {"short.bin"});
  expect_error(train("run", {"--seq-len", "256", "--batch-size", "4096"}), 1, {"tokens"});
  expect_error({"prepare", "--text", path("nothing.txt"), "--out", path("d")}, 1, {"nothing.txt"});
  expect_error({"generate", "--model", path("nothing")}, 1, {"nothing"});
  expect_error(train("run", {"--init", path("nothing")}), 1, {"nothing"});
  expect_error(train("run", {"--model", "gpt2-xl:layers=1000,channels=64000,heads=100"}), 1,
               {"GiB", "--model"});

  ASSERT_EQ(run(train("good", {"--steps", "2"})).status, 0);
  const std::string folder = path("good/checkpoints/step-00000002");
  expect_error(train("good", {"--steps", "4", "--resume", "--hidden", "muon:lr=0.5"}), 1,
               {"rules", "state.json"});
  expect_error(train("good", {"--steps", "4", "--resume", "--seq-len", "16"}), 1, {"seq_len"});
  std::string model = read(folder + "/model.safetensors");
  model[model.size() - 100] ^= 1;  // one bit of one value
  std::ofstream(folder + "/model.safetensors") << model;
  expect_error({"generate", "--model", folder}, 1, {"model.safetensors", "not those that were saved"});
  std::ofstream(folder + "/model.safetensors") << model.substr(0, 1000);
  expect_error({"generate", "--model", folder}, 1, {"model.safetensors"});
  std::ofstream(folder + "/config.json") << "{]";
  expect_error({"generate", "--model", folder}, 1, {"config.json"});
}

TEST_F(Program, AFolderWithARunIsNotOverwritten) {
  prepare();
  ASSERT_EQ(run(train("run", {"--steps", "2"})).status, 0);
  const std::string before = read(path("run/log.jsonl"));
  expect_error(train("run", {"--steps", "3"}), 2, {"--out", "--resume"});
  EXPECT_EQ(read(path("run/log.jsonl")), before);
}

TEST_F(Program, ANonFiniteLossStopsWithStepTensorAndCheckpoint) {
  prepare();
  ASSERT_EQ(run(train("run", {"--steps", "50", "--checkpoint-every", "1", "--keep", "0", "--hidden",
                              "sgd:lr=1e6", "--embedding", "sgd:lr=1e6", "--position", "sgd:lr=1e6",
                              "--vector", "sgd:lr=1e6", "--schedule", "constant", "--grad-clip", "0"}))
                .status,
            1);
  const std::string error = read(path("stderr"));
  EXPECT_NE(error.find("not finite"), std::string::npos) << error;
  EXPECT_NE(error.find("step "), std::string::npos) << error;
  EXPECT_TRUE(error.find(".weight") != std::string::npos || error.find(".bias") != std::string::npos)
      << error;
  EXPECT_FALSE(read(path("run/checkpoints/step-00000001/model.safetensors")).empty());
}

TEST_F(Program, GenerateIsRepeatable) {
  prepare();
  ASSERT_EQ(run(train("run")).status, 0);
  const Words words = {"generate", "--model", path("run"), "--prompt", "the ",
                       "--tokens", "40",      "--seed",    "3"};
  const Result a = run(words), b = run(words);
  EXPECT_EQ(a.status, 0) << a.err;
  EXPECT_EQ(a.out, b.out);
  EXPECT_TRUE(a.out.starts_with("the "));
  Words greedy = words, one = words;
  greedy.insert(greedy.end(), {"--temperature", "0"});
  one.insert(one.end(), {"--top-k", "1"});
  EXPECT_EQ(run(greedy).out, run(one).out);
}

TEST_F(Program, InitStartsWhereTheCheckpointEnded) {
  prepare();
  ASSERT_EQ(run(train("run")).status, 0);
  ASSERT_EQ(run(train("more", {"--steps", "0", "--init", path("run/checkpoints/step-00000012")})).status, 0);
  EXPECT_EQ(log("more")[1]["loss"], log("run").back()["val_loss"]);
  // The bare file, without config.json beside it: --model says the sizes.
  fs::copy(path("run/checkpoints/step-00000012/model.safetensors"), path("bare.safetensors"));
  ASSERT_EQ(run(train("bare", {"--steps", "0", "--init", path("bare.safetensors")})).status, 0);
  EXPECT_EQ(log("bare")[1]["loss"], log("run").back()["val_loss"]);
  const Result evaluated = run({"evaluate", "--model", path("run"), "--data", path("data/val_*.bin"),
                                "--seq-len", "32", "--tokens", "512", "--batch-size", "4"});
  EXPECT_NE(evaluated.out.find(fmt_loss(log("run").back()["val_loss"])), std::string::npos) << evaluated.out;
}

TEST_F(Program, AConfigFileStandsForOptions) {
  prepare();
  std::ofstream(path("tiny.conf")) << "# a comment\nsteps = 3\nshuffle\nhidden = \"muon:lr=0.01\"\n";
  ASSERT_EQ(run(train("flags", {"--steps", "3", "--shuffle", "--hidden", "muon:lr=0.01"})).status, 0);
  Words words = train("file");
  words.erase(std::find(words.begin(), words.end(), "--steps"),
              std::find(words.begin(), words.end(), "--val-every"));
  words.insert(words.end(), {"--config", path("tiny.conf")});
  ASSERT_EQ(run(words).status, 0) << read(path("stderr"));
  EXPECT_EQ(losses("flags"), losses("file"));
  std::ofstream(path("bad.conf")) << "steps = 3\n--shuffle\n";
  words.back() = path("bad.conf");
  expect_error(words, 2, {"line 2", "bad.conf"});
}

TEST_F(Program, InfoShowsRolesRulesAndMemory) {
  const Result result = run({"info", "--model", "gpt2-nano"});
  ASSERT_EQ(result.status, 0) << result.err;
  for (const char* part :
       {"memory", "wte.weight", "embedding", "h.2.attn.c_attn.weight", "3 x (48, 48)", "muon", "adam"})
    EXPECT_NE(result.out.find(part), std::string::npos) << part;
  EXPECT_EQ(result.out.find("GFLOP"), std::string::npos);  // alone there is nothing to split
}

TEST_F(Program, InfoShowsWhereStepSizesComeFrom) {
  const Words info = {"info", "--model", "gpt2-nano", "--hidden", "muon:lr=0.0317", "--schedule", "linear"};
  const auto shows = [&](const Words& more, const Words& parts, bool lr) {
    Words words = info;
    words.insert(words.end(), more.begin(), more.end());
    std::string out = run(words).out;
    for (size_t at; (at = out.find("muon:lr=0.0317")) != std::string::npos;)
      out.erase(at, 14);  // the user's words
    for (const std::string& part : parts) EXPECT_NE(out.find(part), std::string::npos) << part << "\n" << out;
    EXPECT_EQ(out.find(" 0.0317 ") != std::string::npos, lr) << out;
  };
  shows({}, {"each rule's lr", "linear:warmup=0"}, true);
  shows({"--sharpness", "123"}, {"dual norms / 123", " eta "}, false);  // no lr that nobody uses
  shows({"--escape", "1e-5"}, {"escape velocity, from 1e-05", " eta "}, false);
  shows({"--vector", "prodigy"}, {"each rule's lr", "lr x eta"}, true);
}

TEST_F(Program, InfoShowsAnySplit) {
  const Result result = run({"info", "--model", "gpt2", "--ranks", "8"});
  ASSERT_EQ(result.status, 0) << result.err;
  for (const char* part : {"0-7 by rows", "GFLOP", "15555072", "203.9", "1.000 of the mean work",
                           "MiB for each rank of", "optimizer state 78.2"})
    EXPECT_NE(result.out.find(part), std::string::npos) << part << "\n" << result.out;
  const Result sharp =
      run({"info", "--model", "gpt2", "--ranks", "8", "--sharpness", "4096", "--grad-clip", "0"});
  EXPECT_NE(sharp.out.find("optimizer state 156.4"), std::string::npos) << sharp.out;  // and a copy of it
  expect_error({"info", "--ranks", "-1"}, 2, {"--ranks", "integer"});
}

TEST_F(Program, PolarShowsBandsAndPicksSteps) {
  const Result all = run({"polar", "--within", "0.05", "--plot", path("all.dat")});
  ASSERT_EQ(all.status, 0) << all.err;
  for (const char* part : {"keller5", "484.88", "0.470544 .. 1.202369", "polar-express",
                           "0.846647 .. 1.141127", "quintic12", "never: 100 steps leave", "all.dat"})
    EXPECT_NE(all.out.find(part), std::string::npos) << part << "\n" << all.out;
  const Result one = run({"polar", "--ns", "4x1.5:-0.5", "--least", "0.01", "--plot", path("one.dat")});
  ASSERT_EQ(one.status, 0) << one.err;
  EXPECT_NE(one.out.find("slope 5.0625"), std::string::npos) << one.out;
  std::istringstream lines(read(path("one.dat")));
  std::string header;
  std::getline(lines, header);
  EXPECT_EQ(header, "# x 1 2 3 4");
  int points = 0;
  for (double x, a, b, c, d; lines >> x >> a >> b >> c >> d; ++points) {
    EXPECT_NEAR(a, 1.5 * x - 0.5 * x * x * x, 1e-7);
    EXPECT_GE(d, a);
  }
  EXPECT_EQ(points, 1001);
  expect_error({"polar", "--ns", "svd"}, 2, {"svd", "--ns"});
  expect_error({"polar", "--ns", "keller"}, 2, {"keller", "keller5"});
  expect_error({"polar", "--ns", "3:-0.5"}, 2, {"3:-0.5", "[0, 2]"});
  expect_error({"polar", "--least", "0"}, 2, {"--least"});
  expect_error({"polar", "--plot", path("no/such/folder.dat")}, 1, {"folder.dat"});
}

TEST_F(Program, AFullDiskKeepsTheOlderCheckpoint) {
  prepare();
  const std::string disk = path("disk");
  const TinyDisk tiny(disk, "6m");
  if (!tiny.mounted()) GTEST_SKIP() << "mounting a small disk needs root";
  const Result result = run(train("disk/run", {"--steps", "40", "--checkpoint-every", "1", "--keep", "0"}));
  EXPECT_EQ(result.status, 1);
  EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
  int complete = 0;
  for (const auto& entry : fs::directory_iterator(disk + "/run/checkpoints")) {
    if (entry.path().extension() == ".tmp") continue;
    ++complete;
    EXPECT_EQ(run({"generate", "--model", entry.path().string(), "--tokens", "1"}).status, 0);
  }
  EXPECT_GT(complete, 0);
}
