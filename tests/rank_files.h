// What tests of files by several ranks share: tensors in pieces, ranks that end alike, a rank that cannot
// write.
#pragma once

#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <initializer_list>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "model/safetensors.h"
#include "random.h"
#include "tests/rank_processes.h"
#include "tests/rank_threads.h"
#include "tests/temporary_folder.h"

/// Tensors with memory of their own, as a rank has them.
struct Tensors {
  std::vector<std::vector<char>> memory;
  std::vector<NamedTensor> list;

  void add(const std::string& name, DType dtype, Shape shape, bool transposed = false) {
    memory.emplace_back(static_cast<size_t>(shape.size() * dtype_bytes(dtype)) + 1, '\x55');
    list.push_back({name, Tensor(memory.back().data(), dtype, shape), transposed});
  }
  // The same bytes for the same seed.
  void fill(uint64_t seed) {
    Random random(seed);
    for (std::vector<char>& block : memory)
      for (size_t i = 0; i + 1 < block.size(); ++i) block[i] = static_cast<char>(random.bits());
  }
};

/// Cuts every tensor anywhere, also into single rows, and gives the pieces to ranks; whole tensors sometimes.
/// What `rank` does not own has no data. The same cuts for the same seed.
inline std::vector<NamedTensor> cut(const std::vector<NamedTensor>& wholes, uint64_t seed, int rank,
                                    int ranks) {
  Random random(seed);
  std::vector<NamedTensor> pieces;
  for (const NamedTensor& whole : wholes) {
    const bool in_pieces = whole.value.shape.rank() > 0 && random.uniform() < 0.8;
    int64_t first = 0;
    do {
      const int64_t left = whole.rows() - first;
      const int64_t rows =
          in_pieces ? std::min<int64_t>(left, 1 + static_cast<int64_t>(random.uniform() * 9)) : left;
      NamedTensor piece = whole;
      if (in_pieces) piece.value = whole.value.slice(first, rows), piece.first_row = first;
      if (in_pieces) piece.all_rows = whole.rows();
      const int owner = static_cast<int>(random.bits() % static_cast<uint64_t>(ranks));
      if (owner != rank) piece.value.data = nullptr;
      pieces.push_back(piece);
      first += rows;
    } while (first < whole.rows());
  }
  return pieces;
}

enum class RanksAre : uint8_t { threads, processes };

/// Runs `body` on every rank at once. Returns what each rank threw, "" for nothing.
inline std::vector<std::string> run_ranks(int ranks, const std::function<void(Comm&)>& body,
                                          RanksAre are = RanksAre::threads) {
  if (are == RanksAre::processes) return on_processes(ranks, body);
  return on_ranks(ranks, [&](const std::shared_ptr<Comm>& comm) { body(*comm); });
}

/// What run_ranks() returns when nobody has anything to say.
inline std::vector<std::string> well(int ranks) {
  return std::vector<std::string>(static_cast<size_t>(ranks));
}

/// The largest file that this process may write from now on; an error instead of a signal beyond.
inline void limit_files(rlim_t bytes) {
  std::signal(SIGXFSZ, SIG_IGN);
  const rlimit limit{bytes, bytes};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
}

class FilesByRanks : public ::testing::Test {
 protected:
  std::string path(const std::string& name) const { return folder_.path(name); }

  // All ranks end with the same error, which has these parts, and nothing is left but `names`.
  void expect_same(const std::vector<std::string>& said, std::initializer_list<std::string> parts,
                   const std::string& folder, const std::set<std::string>& names = {}) const {
    for (const std::string& text : said) {
      EXPECT_EQ(text, said[0]);
      EXPECT_EQ(text.find('\n'), std::string::npos) << text;
    }
    for (const std::string& part : parts)
      EXPECT_NE(said[0].find(part), std::string::npos) << part << " in: " << said[0];
    std::set<std::string> there;
    for (const std::filesystem::directory_entry& entry : std::filesystem::directory_iterator(folder))
      there.insert(entry.path().filename());
    EXPECT_EQ(there, names);
  }
  TemporaryFolder folder_;
};
