// Several ranks as processes of one machine, for tests: children that share files and one block of memory, in
// which they meet. For what happens on the host: only Comm::sum is there. Threads are in rank_threads.h.
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

/// Where N ranks meet: memory that processes that fork() made share.
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

class ProcessComm final : public Comm {
 public:
  ProcessComm(int rank, int size, MeetingPlace& place) : Comm(rank, size), place_(place) {}

  void sum(std::span<double> values) override {
    if (values.size() > MeetingPlace::kNumbers) throw std::logic_error("ProcessComm: too many numbers");
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
      if (place_.left > 0 && place_.round == round) throw std::logic_error("ProcessComm: a rank has left");
      std::this_thread::yield();
    }
  }
  MeetingPlace& place_;
};

/// Runs `body` on every rank at once. Returns what each rank threw, "" for nothing. Operations run with one
/// thread; expectations of a child are not heard. A rank that a signal ended has said "killed".
inline std::vector<std::string> on_processes(int ranks, const std::function<void(Comm&)>& body) {
  MeetingPlace* place = MeetingPlace::make();
  std::vector<pid_t> children;
  for (int rank = 0; rank < ranks; ++rank) {
    children.push_back(::fork());
    if (children.back() != 0) continue;
    omp_set_num_threads(1);  // the parent's threads are not here
    std::string said;
    try {
      ProcessComm comm(rank, ranks, *place);
      body(comm);
    } catch (const std::exception& error) {
      said = error.what();
    }
    said.copy(place->said[rank], sizeof place->said[rank] - 1);
    ++place->left;
    ::_exit(0);
  }
  for (int rank = 0; rank < ranks; ++rank) {
    int status = 0;
    const pid_t child = ::waitpid(-1, &status, 0);
    if (WIFEXITED(status)) continue;
    const auto killed = std::find(children.begin(), children.end(), child) - children.begin();
    std::string("killed").copy(place->said[killed], 7);
    ++place->left;
  }
  std::vector<std::string> said(place->said, place->said + ranks);
  ::munmap(place, sizeof *place);
  return said;
}
