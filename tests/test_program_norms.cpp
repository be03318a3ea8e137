// Telemetry as the program logs it, with and without a GPU.
#include "tests/program_fixture.h"

namespace {
class ProgramNorms : public ProgramTest, public testing::WithParamInterface<const char*> {
 protected:
  ProgramNorms() : ProgramTest(GetParam()) {}
  Words words(const std::string& out, Words more = {}) {
    if (GetParam() == std::string("TRAIN_GPT_GPU")) more.insert(more.end(), {"--device", "cuda"});
    return train(out, more);
  }
  std::vector<json> norms(const std::string& out) {
    std::vector<json> lines;
    for (const json& line : log(out))
      if (line["type"] == "norms") lines.push_back(line);
    return lines;
  }
};
INSTANTIATE_TEST_SUITE_P(On, ProgramNorms, testing::Values("TRAIN_GPT", "TRAIN_GPT_GPU"),
                         [](const auto& info) {
                           return info.param == std::string("TRAIN_GPT") ? "Cpu" : "Gpu";
                         });
}  // namespace

TEST_P(ProgramNorms, AreLoggedAndChangeNothing) {
  prepare();
  const Result result = run(words("run", {"--steps", "6", "--norms-every", "4", "--grad-accum", "2",
                                          "--batch-size", "2", "--dtype", "fp32"}));
  const Result again =
      run(words("same", {"--steps", "6", "--grad-accum", "2", "--batch-size", "2", "--dtype", "fp32"}));
  ASSERT_EQ(result.status, 0) << result.err;
  ASSERT_EQ(again.status, 0) << again.err;
  EXPECT_NE(result.out.find("telemetry"), std::string::npos);  // the memory plan's line
  EXPECT_EQ(again.out.find("telemetry"), std::string::npos);
  EXPECT_NE(result.out.find("step 4: loss"), std::string::npos);
  EXPECT_NE(result.out.find("\nh.1.mlp.c_fc.weight "), std::string::npos);
  EXPECT_NE(result.out.find("vectors, in log.jsonl"), std::string::npos);
  EXPECT_EQ(read(path("run/checkpoints/step-00000006/model.safetensors")),
            read(path("same/checkpoints/step-00000006/model.safetensors")));
  const std::vector<json> lines = norms("run");
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_TRUE(norms("same").empty());
  std::map<int, double> loss;
  for (const json& line : log("same"))
    if (line["type"] == "train") loss[line["step"]] = line["loss"];
  for (size_t i = 0; i < lines.size(); ++i) {
    const json& line = lines[i];
    EXPECT_EQ(line["step"], 4 * static_cast<int>(i));
    EXPECT_EQ(line["loss"], loss[static_cast<int>(4 * i)]);
    for (const char* key : {"loss_after", "predicted", "bound", "length", "sharpness"})
      EXPECT_TRUE(line[key].is_number()) << key;
    EXPECT_LT(line["loss_after"], line["loss"]);
    const json& tensor = line["tensors"]["h.0.attn.c_attn.weight"];
    EXPECT_EQ(tensor["norm_name"], "spectral-keller");
    EXPECT_EQ(tensor["role"], "hidden");
    for (const char* key : {"weight", "update", "gradient_dual", "alignment", "sharpness", "step", "s_step"})
      EXPECT_TRUE(tensor[key].is_number()) << key;
    EXPECT_EQ(tensor["band"].size(), 2u);
    EXPECT_FALSE(line["tensors"]["wte.weight"].contains("band"));
  }
}

TEST_P(ProgramNorms, AResumedRunHasEachLineOnce) {
  prepare();
  ASSERT_EQ(run(words("run", {"--norms-every", "2", "--checkpoint-every", "6"})).status, 0);
  const std::vector<json> whole = norms("run");
  fs::remove_all(path("run/checkpoints/step-00000012"));
  const Result result = run(words("run", {"--norms-every", "2", "--checkpoint-every", "6", "--resume"}));
  ASSERT_EQ(result.status, 0) << result.err;
  EXPECT_EQ(norms("run"), whole);
}
