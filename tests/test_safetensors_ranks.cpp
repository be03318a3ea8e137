// Files that several ranks write, each what it owns, and that any number of ranks reads; and how ranks agree.
#include <cstring>
#include <filesystem>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "error.h"
#include "model/kernels/together.h"
#include "tests/rank_files.h"

namespace fs = std::filesystem;

namespace {

const std::map<std::string, std::string> kMetadata{{"format", "pt"}};

using SafetensorsRanks = FilesByRanks;

// Of every dtype and rank, stored as it is and transposed; one that takes more than a buffer.
Tensors every_kind() {
  Tensors all;
  all.add("h.0.weight", DType::f32, {17, 130}, true);
  all.add("h.0.qkv", DType::f32, {21, 40}, true);
  all.add("large", DType::f32, {900, 1600}, true);
  all.add("wte", DType::f32, {61, 6});
  all.add("halves", DType::bf16, {9, 65}, true);
  all.add("ints", DType::i32, {5, 7}, true);
  all.add("doubles", DType::f64, {70, 3}, true);
  all.add("cube", DType::f32, {6, 2, 5});
  all.add("vector", DType::f32, {13});
  all.add("scalar", DType::f64, Shape{});
  all.add("empty", DType::f32, {0, 4});
  return all;
}

// ---- Agreement

TEST_F(SafetensorsRanks, TextsReachAllRanksAndFailuresToo) {
  using std::string_literals::operator""s;
  const std::string text = "a text of 31 bytes, with \xff and \0 "s;
  for (const int ranks : {1, 2, 5}) {
    const auto said = run_ranks(ranks, [&](Comm& comm) {
      for (int root = 0; root < ranks; ++root)
        for (size_t length = 0; length <= text.size(); ++length) {
          const std::string mine = comm.rank() == root ? text.substr(0, length) : "mine";
          EXPECT_EQ(broadcast_text(comm, mine, root), text.substr(0, length));
        }
      int done = 0;
      together(comm, [&] { ++done; });
      EXPECT_EQ(done, 1);
      together(comm, [] {});
    });
    EXPECT_EQ(said, well(ranks));
  }
  // The lowest rank is heard, whatever it throws; from an agreement inside another, said once.
  const auto said = run_ranks(4, [](Comm& comm) {
    together(comm, [&] {
      together(comm, [&] {
        if (comm.rank() == 3) throw std::runtime_error("");
        if (comm.rank() == 2) throw std::logic_error("a bug");
      });
      ADD_FAILURE() << "went on";
    });
  });
  EXPECT_EQ(said, std::vector<std::string>(4, "rank 2: a bug"));
  EXPECT_THROW(together(*std::make_unique<Comm>(), [] { throw ShapeError("as it is"); }), ShapeError);
}

// ---- One file

TEST_F(SafetensorsRanks, TheFileDoesNotDependOnWhoWritesWhat) {
  Tensors truth = every_kind();
  truth.fill(1);
  write_safetensors(path("alone"), truth.list);
  const std::string expected = folder_.read("alone");
  for (const int ranks : {1, 2, 3, 5})
    for (uint64_t seed = 0; seed < 3; ++seed) {
      const std::string name = fmt::format("by_{}_{}", ranks, seed);
      const auto said = run_ranks(ranks, [&](Comm& comm) {
        write_safetensors(path(name), cut(truth.list, seed, comm.rank(), ranks), kMetadata, Existing::refuse,
                          comm);
        EXPECT_TRUE(fs::exists(path(name)));  // before anyone goes on
      });
      EXPECT_EQ(said, well(ranks));
      EXPECT_TRUE(folder_.read(name) == expected) << name;
      EXPECT_FALSE(fs::exists(path(name + ".tmp")));
    }
}

TEST_F(SafetensorsRanks, APieceOfMoreThanABufferIsTransposedInSteps) {
  Tensors truth;
  truth.add("w", DType::f32, {300, 4000}, true);
  truth.fill(3);
  write_safetensors(path("alone"), truth.list);
  const auto said = run_ranks(2, [&](Comm& comm) {
    std::vector<NamedTensor> pieces;
    for (const auto& [owner, first, rows] : {std::tuple{1, 0, 290}, {0, 290, 10}}) {
      NamedTensor piece = truth.list[0];
      piece.value = piece.value.slice(first, rows), piece.first_row = first, piece.all_rows = 300;
      if (owner != comm.rank()) piece.value.data = nullptr;
      pieces.push_back(piece);
    }
    write_safetensors(path("by_2"), pieces, kMetadata, Existing::refuse, comm);
  });
  EXPECT_EQ(said, well(2));
  EXPECT_TRUE(folder_.read("by_2") == folder_.read("alone"));
}

TEST_F(SafetensorsRanks, AnyNumberOfRanksReadsItBack) {
  Tensors truth = every_kind();
  truth.fill(2);
  write_safetensors(path("file"), truth.list);
  const SafetensorsReader file(path("file"));
  for (const int ranks : {1, 2, 3, 5}) {
    // What the ranks read, together, is the truth; what they do not own, they do not touch.
    Tensors together = every_kind();
    for (int rank = 0; rank < ranks; ++rank) {
      Tensors mine = every_kind();
      const Tensors before = mine;
      const std::vector<NamedTensor> pieces = cut(mine.list, 7, rank, ranks);
      for (const NamedTensor& piece : pieces) file.read(piece.name, piece);
      for (size_t t = 0; t < mine.memory.size(); ++t)
        for (const NamedTensor& piece : pieces) {
          if (piece.name != mine.list[t].name || !piece.value) continue;
          const auto at =
              static_cast<size_t>(static_cast<const char*>(piece.value.data) - mine.memory[t].data());
          std::memcpy(together.memory[t].data() + at, piece.value.data,
                      static_cast<size_t>(piece.value.bytes()));
          std::memset(piece.value.data, 0x55, static_cast<size_t>(piece.value.bytes()));
        }
      EXPECT_TRUE(mine.memory == before.memory) << rank;
    }
    EXPECT_TRUE(together.memory == truth.memory) << ranks;
  }
}

TEST_F(SafetensorsRanks, PiecesMayLieInTheMemoryOfAGpu) {
  if constexpr (!kHaveGpu) GTEST_SKIP() << "built without CUDA";
  Context ctx;
  use_gpu(ctx, 0, DType::f32);
  Tensors truth = every_kind();
  truth.fill(4);
  write_safetensors(path("host"), truth.list);
  // Copies there, from which the file is written, and others into which it is read.
  std::vector<NamedTensor> from = truth.list, to = truth.list;
  Arena arena("tensors of a test");
  for (std::vector<NamedTensor>* list : {&from, &to})
    for (NamedTensor& t : *list) arena.add(&t.value, t.value.dtype, t.value.shape), t.where = &ctx;
  arena.allocate(ctx);
  for (size_t i = 0; i < from.size(); ++i) {
    OnHost host(ctx, from[i].value, /*load=*/false);
    std::memcpy(host->data, truth.memory[i].data(), static_cast<size_t>(host->bytes()));
    host.store();
  }
  write_safetensors(path("gpu"), cut(from, 1, /*rank=*/0, /*ranks=*/1));
  EXPECT_TRUE(folder_.read("gpu") == folder_.read("host"));
  const SafetensorsReader file(path("gpu"));
  for (const NamedTensor& piece : cut(to, 2, 0, 1)) file.read(piece.name, piece);
  for (size_t i = 0; i < to.size(); ++i) {
    const OnHost host(ctx, to[i].value);
    EXPECT_EQ(std::memcmp(host->data, truth.memory[i].data(), static_cast<size_t>(host->bytes())), 0)
        << to[i].name;
  }
}

TEST_F(SafetensorsRanks, APieceOfAnotherShapeIsRefused) {
  Tensors truth = every_kind();
  write_safetensors(path("file"), truth.list);
  const SafetensorsReader file(path("file"));
  NamedTensor piece = truth.list[1];  // (21, 40), on disk (40, 21)
  piece.value = piece.value.slice(0, 7), piece.first_row = 14, piece.all_rows = 22;
  expect_error<RunError>([&] { file.read(piece.name, piece); }, {"'h.0.qkv'", "(40, 21)", "(40, 22)"});
  piece.value.data = nullptr;  // also when it is another rank's
  expect_error<RunError>([&] { file.read(piece.name, piece); }, {"'h.0.qkv'", "(40, 21)", "(40, 22)"});
  expect_error<RunError>([&] { file.read("gone", piece); }, {"'gone'", "missing"});
  piece.all_rows = 20;  // shorter than its pieces
  EXPECT_THROW(file.read(piece.name, piece), ShapeError);
}

TEST_F(SafetensorsRanks, ListsThatDoNotFitAreRefusedByAllRanks) {
  Tensors truth = every_kind();
  const auto refused = [&](const std::function<void(std::vector<NamedTensor>&, int)>& change,
                           std::initializer_list<std::string> parts) {
    const auto said = run_ranks(3, [&](Comm& comm) {
      std::vector<NamedTensor> pieces;
      for (int64_t i = 0; i < 3; ++i) {
        NamedTensor piece = truth.list[1];
        piece.value = piece.value.slice(7 * i, 7), piece.first_row = 7 * i, piece.all_rows = 21;
        if (i != comm.rank()) piece.value.data = nullptr;
        pieces.push_back(piece);
      }
      change(pieces, comm.rank());
      write_safetensors(path("file"), pieces, kMetadata, Existing::refuse, comm);
    });
    expect_same(said, parts, folder_.path());
  };
  using List = std::vector<NamedTensor>;
  refused([](List& l, int) { l[1].value.data = nullptr; }, {"rows 7 to 14 of h.0.qkv are on 0 ranks of 3"});
  refused(
      [](List& l, int rank) {
        if (rank == 0) l[1].value.data = l[0].value.data;
      },
      {"rows 7 to 14 of h.0.qkv are on 2 ranks of 3"});
  refused([](List& l, int) { l.pop_back(); }, {"rank 0: ", "rows of a tensor are in no piece"});
  refused([](List& l, int) { std::swap(l[0], l[1]); }, {"rank 0: ", "follow each other"});
  refused([](List& l, int) { l[2].transposed = false; }, {"rank 0: ", "alike"});
  refused(
      [](List& l, int rank) {
        if (rank == 2) l.push_back({"more", l[0].value});
      },
      {"rank 2: the tensors are not those of rank 0", path("file")});
  refused(
      [](List& l, int rank) {  // the same tensor, cut elsewhere
        if (rank == 1) l[0].value.shape = {6, 40}, l[1].value.shape = {8, 40}, l[1].first_row = 6;
      },
      {"rank 1: the tensors are not those of rank 0"});
}

TEST_F(SafetensorsRanks, WhatAllRanksHaveIsWrittenOnce) {
  const auto said = run_ranks(3, [&](Comm& comm) {
    float value = comm.rank() == 0 ? 4.0f : -1.0f;  // rank 0's counts
    write_safetensors(path("file"), std::vector<NamedTensor>{{"v", Tensor(&value, {1})}}, kMetadata,
                      Existing::refuse, comm);
  });
  EXPECT_EQ(said, well(3));
  float value = 0;
  SafetensorsReader(path("file")).read("v", {"v", Tensor(&value, {1})});
  EXPECT_EQ(value, 4);
}

// Writes `truth` by three ranks, each with a path of its own; what they say.
std::vector<std::string> write_at(const Tensors& truth, const std::function<std::string(int)>& path_of,
                                  RanksAre are = RanksAre::threads,
                                  const std::function<void(int)>& before = {}) {
  return run_ranks(
      3,
      [&](Comm& comm) {
        if (before) before(comm.rank());
        write_safetensors(path_of(comm.rank()), cut(truth.list, 5, comm.rank(), 3), kMetadata,
                          Existing::refuse, comm);
      },
      are);
}

TEST_F(SafetensorsRanks, ARankThatSeesAnotherFolderSaysSo) {
  const Tensors truth = every_kind();
  fs::create_directory(path("shared"));
  fs::create_directory(path("other"));
  const auto path_of = [&](int rank) { return path(rank == 2 ? "other/file" : "shared/file"); };
  const std::vector<std::string> not_there = write_at(truth, path_of);
  expect_same(not_there, {"rank 2: ", "does not see", "No such file", path("other/file"), "share"},
              path("shared"));
  // Left there by an earlier run on that machine.
  folder_.write("other/file.tmp", std::string(100'000, '\1'));
  expect_same(write_at(truth, path_of), {"rank 2: ", "does not see", "another file", path("other/file")},
              path("shared"));
  EXPECT_EQ(folder_.read("other/file.tmp"), std::string(100'000, '\1'));
  fs::remove(path("other/file.tmp"));
  expect_same(write_at(truth, [&](int rank) { return path(rank == 0 ? "gone/file" : "shared/file"); }),
              {"rank 0: cannot write", path("gone/file"), "No such file"}, path("shared"));
  folder_.write("shared/file", "taken");
  expect_same(write_at(truth, path_of), {"rank 0: ", path("shared/file"), "overwritten"}, path("shared"),
              {"file"});
  EXPECT_EQ(folder_.read("shared/file"), "taken");
}

TEST_F(SafetensorsRanks, AFullDiskShowsBeforeAnythingIsWritten) {
  const TinyDisk tiny(path("disk"), "256k");
  if (!tiny.mounted()) GTEST_SKIP() << "cannot mount a small disk here (needs root)";
  const Tensors truth = every_kind();  // 5.8 MB
  expect_same(write_at(truth, [&](int) { return path("disk/file"); }),
              {"rank 0: cannot write", "No space left", path("disk/file"), "free some space"}, path("disk"));
}

TEST_F(SafetensorsRanks, OneRankThatCannotWriteStopsAll) {
  const Tensors truth = every_kind();
  fs::create_directory(path("run"));
  for (int failing = 0; failing < 3; ++failing) {
    const auto said = write_at(
        truth, [&](int) { return path("run/file"); }, RanksAre::processes,
        [&](int rank) {
          if (rank == failing) limit_files(1 << 20);
        });
    expect_same(said, {fmt::format("rank {}: cannot write", failing), "File too large", path("run/file")},
                path("run"));
  }
}

}  // namespace
