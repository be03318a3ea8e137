// Ranks for tests of what happens on the host: threads of this process, or child processes, that meet in
// shared memory. Only Comm::sum is there.
#pragma once

#include <omp.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <new>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "model/kernels/comm.h"

/// Where N ranks meet: memory that processes made by fork() share.
struct MeetingPlace {
  static constexpr int kRanks = 16, kNumbers = 1 << 14;
  std::atomic<int> arrived{0}, round{0}, left{0};
  double numbers[kRanks][kNumbers];
  char said[kRanks][1024];  // how each rank ended

  static MeetingPlace* make() {
    void* memory =
        ::mmap(nullptr, sizeof(MeetingPlace), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return new (memory) MeetingPlace;
  }
};

class MeetingComm : public Comm {
 public:
  MeetingComm(int rank, int size, MeetingPlace& place) : Comm(rank, size), place_(place) {}

  void sum(std::span<double> values) override {
    if (values.size() > MeetingPlace::kNumbers) throw std::logic_error("MeetingComm: too many numbers");
    std::copy(values.begin(), values.end(), place_.numbers[rank()]);
    meet();
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = place_.numbers[0][i];
      for (int r = 1; r < size(); ++r) values[i] += place_.numbers[r][i];
    }
    meet();
  }

 private:
  // A rank that has left will not come any more: then this throws instead of waiting for ever.
  void meet() {
    const int round = place_.round;
    if (++place_.arrived == size()) {
      place_.arrived = 0;
      ++place_.round;
      return;
    }
    while (place_.round == round) {
      if (place_.left > 0 && place_.round == round) throw std::logic_error("MeetingComm: a rank has left");
      std::this_thread::yield();
    }
  }
  MeetingPlace& place_;
};

enum class RanksAre : uint8_t { threads, processes };

/// Runs `work` on N ranks; what each threw, "" for nothing. Processes share files and nothing else, and run
/// operations with one thread.
inline std::vector<std::string> run_ranks(int ranks, const std::function<void(Comm&)>& work,
                                          RanksAre are = RanksAre::threads) {
  MeetingPlace* place = MeetingPlace::make();
  const auto run = [&](int rank) {
    std::string said;
    try {
      MeetingComm comm(rank, ranks, *place);
      work(comm);
    } catch (const std::exception& error) {
      said = error.what();
    }
    said.copy(place->said[rank], sizeof place->said[rank] - 1);
    ++place->left;
  };
  if (are == RanksAre::threads) {
    std::vector<std::jthread> threads;
    for (int rank = 0; rank < ranks; ++rank) threads.emplace_back(run, rank);
  } else {
    std::vector<pid_t> children;
    for (int rank = 0; rank < ranks; ++rank) {
      children.push_back(::fork());
      if (children.back() != 0) continue;
      omp_set_num_threads(1);  // the parent's threads are not here
      run(rank);
      ::_exit(0);
    }
    for (const pid_t child : children) ::waitpid(child, nullptr, 0);
  }
  std::vector<std::string> said(place->said, place->said + ranks);
  ::munmap(place, sizeof *place);
  return said;
}
