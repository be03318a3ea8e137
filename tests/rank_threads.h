// Several ranks inside one process, for tests: threads that meet at a barrier, each with a communicator of
// its own. Tensors are in host memory.
//
//   on_ranks(4, [](const std::shared_ptr<Comm>& comm) { Context ctx; ctx.comm = comm; ... });
//
// Exchanges happen in finish(), as late as a caller may see them, and what an exchange leaves undefined is
// filled with NaN: whoever looks too early or at the wrong part gets wrong numbers.
#pragma once

#include <condition_variable>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "model/kernels/comm.h"

/// Where the ranks meet: a barrier that a failed rank breaks, and a place to show what each has brought.
class Meeting {
 public:
  explicit Meeting(int ranks) : ranks_(ranks), brought_(static_cast<size_t>(ranks)) {}

  /// Waits for all ranks. std::runtime_error when one has failed.
  void wait() {
    std::unique_lock lock(mutex_);
    const int64_t round = round_;
    if (++waiting_ == ranks_) {
      waiting_ = 0;
      ++round_;
      all_here_.notify_all();
    }
    all_here_.wait(lock, [&] { return round_ != round || failed_; });
    if (round_ == round) throw std::runtime_error("another rank has failed");
  }
  void fail() {
    const std::lock_guard lock(mutex_);
    failed_ = true;
    all_here_.notify_all();
  }
  /// What a rank brings to the next exchange; to be looked at between two calls of wait().
  std::vector<Part>& brought(int rank) { return brought_[static_cast<size_t>(rank)]; }

 private:
  std::mutex mutex_;
  std::condition_variable all_here_;
  const int ranks_;
  int waiting_ = 0;
  int64_t round_ = 0;
  bool failed_ = false;
  std::vector<std::vector<Part>> brought_;
};

class ThreadComm final : public Comm {
 public:
  ThreadComm(std::shared_ptr<Meeting> meeting, int rank, int size)
      : Comm(rank, size), meeting_(std::move(meeting)) {}

  const char* name() const override { return "threads"; }
  bool capturable() const override { return false; }

  Ticket start_sum(std::span<const Tensor> tensors) override {
    ++sums_;
    std::vector<Part> parts;
    for (const Tensor& tensor : tensors) parts.push_back({tensor, kEverybody});
    return start(Kind::sum, std::move(parts));
  }
  Ticket start_reduce_scatter(std::span<const Part> parts) override {
    return start(Kind::sum, {parts.begin(), parts.end()});
  }
  Ticket start_all_gather(std::span<const Part> parts) override {
    return start(Kind::gather, {parts.begin(), parts.end()});
  }
  Ticket start_broadcast(const Tensor& tensor, int root) override {
    return start(Kind::gather, {{tensor, root}});
  }
  void finish(Ticket ticket) override {
    for (; done_ <= ticket; ++done_) exchange(pending_.at(static_cast<size_t>(done_)));
  }
  void sum(std::span<double> values) override {
    finish(static_cast<Ticket>(pending_.size()) - 1);
    ++sums_;
    exchange({Kind::sum, {{Tensor(values.data(), {std::ssize(values)}), kEverybody}}});
  }
  /// Sums over all ranks that were asked for so far.
  int64_t sums() const { return sums_; }

 private:
  static constexpr int kEverybody = -1;
  enum class Kind { sum, gather };
  struct Exchange {
    Kind kind;
    std::vector<Part> parts;
  };

  Ticket start(Kind kind, std::vector<Part> parts) {
    pending_.push_back({kind, std::move(parts)});
    return static_cast<Ticket>(pending_.size()) - 1;
  }

  void exchange(const Exchange& what) {
    meeting_->brought(rank()) = what.parts;
    meeting_->wait();
    std::vector<std::vector<std::byte>> results;
    for (size_t i = 0; i < what.parts.size(); ++i) results.push_back(result(what, i));
    meeting_->wait();  // everybody has read
    for (size_t i = 0; i < what.parts.size(); ++i)
      if (!results[i].empty()) std::memcpy(what.parts[i].tensor.data, results[i].data(), results[i].size());
  }

  /// What part i becomes here.
  std::vector<std::byte> result(const Exchange& what, size_t i) {
    const Part& mine = what.parts[i];
    std::vector<std::byte> bytes(static_cast<size_t>(mine.tensor.bytes()));
    if (bytes.empty()) return bytes;
    if (what.kind == Kind::gather) {
      std::memcpy(bytes.data(), of_rank(mine.owner, what, i).tensor.data, bytes.size());
    } else if (mine.tensor.dtype == DType::f64) {
      add<double>(what, i, bytes.data());
    } else {
      expect(mine.tensor.dtype == DType::f32, "ThreadComm: only f32 and f64 are summed");
      add<float>(what, i, bytes.data());
    }
    return bytes;
  }

  template <typename T>
  void add(const Exchange& what, size_t i, std::byte* bytes) {
    auto* sums = reinterpret_cast<T*>(bytes);
    const int64_t n = what.parts[i].tensor.size();
    const int owner = what.parts[i].owner;
    for (int r = 0; r < size(); ++r) {
      const T* x = static_cast<const T*>(of_rank(r, what, i).tensor.data);
      for (int64_t k = 0; k < n; ++k) sums[k] = r == 0 ? x[k] : sums[k] + x[k];
    }
    if (owner != kEverybody && owner != rank()) std::fill_n(sums, n, std::numeric_limits<T>::quiet_NaN());
  }

  /// Part i of another rank, which must have made the same call.
  const Part& of_rank(int r, const Exchange& what, size_t i) {
    const std::vector<Part>& theirs = meeting_->brought(r);
    const Part& mine = what.parts[i];
    if (theirs.size() != what.parts.size() || theirs[i].owner != mine.owner ||
        theirs[i].tensor.dtype != mine.tensor.dtype || theirs[i].tensor.size() != mine.tensor.size())
      throw std::logic_error("ThreadComm: ranks make different calls");
    return theirs[i];
  }

  std::shared_ptr<Meeting> meeting_;
  std::vector<Exchange> pending_;
  Ticket done_ = 0;
  int64_t sums_ = 0;
};

/// Runs `body` on every rank at once. Returns what each rank threw, "" for nothing.
inline std::vector<std::string> on_ranks(int ranks,
                                         const std::function<void(const std::shared_ptr<Comm>&)>& body) {
  const auto meeting = std::make_shared<Meeting>(ranks);
  std::vector<std::string> failures(static_cast<size_t>(ranks));
  std::vector<std::thread> threads;
  for (int r = 0; r < ranks; ++r)
    threads.emplace_back([&, r] {
      try {
        body(std::make_shared<ThreadComm>(meeting, r, ranks));
      } catch (const std::exception& error) {
        failures[static_cast<size_t>(r)] = error.what();
        meeting->fail();
      }
    });
  for (std::thread& thread : threads) thread.join();
  return failures;
}
