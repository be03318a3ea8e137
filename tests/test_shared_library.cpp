// Libraries that are opened while the program runs: cuBLASLt and NCCL on GPUs, here the C library's maths.
#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "error.h"
#include "model/kernels/shared_library.h"

namespace {
/// The complaint about what `open` cannot find.
template <typename Open>
std::string complaint(const Open& open) {
  try {
    open();
  } catch (const RunError& error) {
    return error.what();
  }
  return "none";
}
}  // namespace

TEST(SharedLibrary, FindsFunctions) {
  const SharedLibrary maths("libm.so.6", "sums need maths", "install it");
  EXPECT_EQ(maths.find<double(double)>("sqrt")(9), 3);
}

TEST(SharedLibrary, NamesTheFileThatIsMissing) {
  EXPECT_EQ(complaint([] { SharedLibrary("libabsent.so.7", "sums need maths", "install it"); }),
            "sums need maths, libabsent.so.7: cannot open shared object file: No such file or directory, "
            "install it");
}

TEST(SharedLibrary, NamesTheFunctionThatIsMissing) {
  const SharedLibrary maths("libm.so.6", "sums need maths", "install a newer one");
  const std::string words = complaint([&] { maths.find<void()>("absent"); });
  EXPECT_TRUE(words.starts_with("sums need maths, ") && words.ends_with(", install a newer one")) << words;
  EXPECT_NE(words.find("libm.so.6: undefined symbol: absent"), std::string::npos) << words;
}

// The loader keeps its last words for each thread.
TEST(SharedLibrary, ThreadsGetTheirOwnComplaints) {
  std::vector<int> wrong(4);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < wrong.size(); ++t)
    threads.emplace_back([&wrong, t] {
      const std::string file = "libabsent.so." + std::to_string(t);
      for (int round = 0; round < 200; ++round)
        if (!complaint([&] { SharedLibrary(file, "it", "help"); }).starts_with("it, " + file + ": "))
          ++wrong[t];
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(4));
}
