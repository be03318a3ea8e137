// One rank's side of the watch: what its main thread says and waits for, and what the watch's thread reports
// and hears. The main thread calls the first half, the thread the second.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <limits>
#include <mutex>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "world/watch.h"
#include "world/watch_judge.h"
#include "world/watch_socket.h"

class Member {
 public:
  Member(int rank, int ranks, const WatchOptions& options);

  int rank() const { return rank_; }
  int ranks() const { return ranks_; }
  bool alone() const { return ranks_ == 1; }
  const WatchOptions& options() const { return options_; }

  // ------------------------------------------------------------------- the main thread; Watch says what each
  // does
  bool start_step(int64_t step);
  void request_stop();
  int64_t stop_step() const;
  /// Returns what it did before.
  std::string do_now(std::string activity);
  void pulse();
  void worked(double seconds);
  void check();
  /// Ends the job, or lets it end.
  [[noreturn]] void fail(const std::string& message, int status);
  /// Waits until all ranks have given the same answer.
  void ask(const Answer& answer);
  /// Waits until all ranks are connected. RunError when rank 0 refuses this one. When the job ends meanwhile,
  /// so does the process, here.
  void wait_for_all();
  void say(const char* word);
  std::vector<RankPace> paces() const;

  // ---------------------------------------------------------------------------------------------------- the
  // thread
  /// What say(), request_stop(), fail() and others have for rank 0.
  Mailbox& mailbox() { return mailbox_; }
  Beat report() const;
  /// What rank 0 says to all.
  void hear(const nlohmann::json& message);
  void set_paces(std::vector<RankPace> paces);
  void set_refused(const std::string& why);
  /// The main thread gets to know it from check() and what waits here.
  void begin_ending();
  /// The main thread is in fail(): its stack is unwound.
  bool parked() const { return parked_; }
  /// Gives the main thread `grace` to get there, then ends the process.
  [[noreturn]] void end_process(int status);

 private:
  static constexpr int64_t kOpen = std::numeric_limits<int64_t>::max(), kHold = -1;

  template <typename Condition>
  void wait(Condition condition);
  void get_on(double now);
  [[noreturn]] void park();

  const int rank_, ranks_;
  const WatchOptions options_;
  Mailbox mailbox_;

  // Stopping. The main thread writes started_, then reads gate_; the thread writes gate_, then reads
  // started_: both sequentially consistent, so a step is either held at the gate or known to have started.
  std::atomic<int64_t> started_ = -1;
  std::atomic<int64_t> gate_ = kOpen;  // steps before this one may start

  std::atomic<bool> ending_ = false, parked_ = false;
  std::atomic<double> checked_ = 0;  // when check() was called last

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::string activity_;
  double got_on_;                   // when
  double longest_ = 0;              // between two signs of getting on in a step
  double work_ = 0;                 // seconds
  int64_t worked_ = 0;              // steps
  int held_ = 0;                    // the main thread waits here
  int64_t asked_ = 0, agreed_ = 0;  // rounds
  bool all_here_ = false;
  std::string refused_;
  std::vector<RankPace> paces_;
};

/// Prints the one line on standard error, behind what is on standard output.
void say_error(const std::string& line);
