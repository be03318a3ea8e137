// What makes a job of N processes end cleanly, and as one, when something goes wrong in one of them.
//
// Rank 0 listens on a TCP port; each other rank connects to it. A thread in each process keeps the
// connection: it says about once a second how far its rank is, and hears what rank 0 decides. Nothing here
// needs MPI or NCCL, and nothing that the main thread is blocked in can hold it up.
//
//   what happens                                       the one line on standard error (train_gpt: error: ...)
//   a rank is killed, or crashes                       rank 2 (host, process 123) ended without a word, ...
//   a rank throws                                      rank 2: <message>
//   all ranks throw the same                           <message>
//   a rank hangs in a step or in other work            rank 2 (...) has not got on for 60 s, in step 17, ...
//   a process is stopped, or its machine is gone       rank 2 (...) has been silent for 10 s, in step 17, ...
//   a rank has another option, file or program         rank 3 has --batch-size 8 and rank 0 has 4, ...
//   parameters differ between ranks                    the parameters of rank 2 differ from those of ...
//
// Rank 0 prints the line; when rank 0 itself is lost, the lowest rank that is left does. The others end
// without a line, all with the status of the failure. A process has a moment to unwind its stack (check()
// throws, so that unfinished files are removed); then its thread ends it, wherever its main thread is
// blocked.
//
// How to use it:
//
//   const InterruptGuard interrupt;  // first: launchers send SIGTERM to the rest when one process has ended
//   Watch watch(rank, ranks, broadcast_from_rank0, {.patience = 60});
//   try {
//     watch.agree({{"--batch-size", "8"}, {"the program", program_fingerprint()}});
//     for (int64_t step = first; step < steps; ++step) {
//       if (interrupt.requested()) watch.request_stop();  // a signal to this rank alone
//       if (!watch.start_step(step)) break;               // all ranks stop before the same step
//       ...                                               // backends call watch.check() while they wait
//       watch.worked(seconds);                            // without the time spent waiting for others
//       if (step % 100 == 0) watch.compare(step, checksum);
//       if (save) {
//         const auto doing = watch.now("writing a checkpoint");
//         ...
//       }
//     }
//   } catch (const UsageError& error) {
//     watch.fail(error.what(), 2);  // comes back only when there is one rank
//     throw;
//   } catch (const std::exception& error) {
//     watch.fail(error.what(), 1);
//     throw;
//   }
//
// The Watch outlives all that can throw. With one rank there are no sockets and no thread.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

/// All in seconds.
struct WatchOptions {
  /// A rank that does not get on in a step for this long, while it does not wait for others, hangs. Ten times
  /// that for what now() names and before the first step is over; at least four times the longest that this
  /// rank has been seen to take between two signs of getting on.
  double patience = 60;
  double silence = 10;  // a process that says nothing for this long is stopped, or its machine gone
  double join = 60;     // for all ranks to come, at the start
  double beat = 1;      // between two reports of one rank
  double grace = 1;     // to unwind the stack when the job ends; to hear whether others fail the same way
};

/// How fast a rank is, as rank 0 knows.
struct RankPace {
  int rank;
  std::string host;
  int64_t step;    // that it started last; -1: none
  double seconds;  // of own work per step, the mean over the last ten reports or so; 0: not known
};

class Member;

class Watch {
 public:
  /// Gets a text on rank 0 and "" elsewhere; returns rank 0's text on all ranks.
  using Broadcast = std::function<std::string(std::string)>;
  using Facts = std::vector<std::pair<std::string, std::string>>;  // name, value

  /// One rank.
  Watch();
  /// Rank `rank` of `ranks`; returns when all are connected. RunError when rank 0 cannot be reached; rank 0
  /// names those that did not come.
  Watch(int rank, int ranks, const Broadcast& broadcast_from_rank0, const WatchOptions& options = {});
  /// Says goodbye, so that nobody takes the end of this process for a crash. On rank 0 it waits for the
  /// goodbyes of all others, and still ends the job when one of them fails.
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  /// Before anything of a step is started or enqueued: true, this rank may start it; false, all ranks stop
  /// before it. Costs a look at an atomic; while ranks agree on where to stop it waits for the answer.
  /// RunError when the job is ending.
  bool start_step(int64_t step);
  /// Asks all ranks to stop as soon as they can do so after the same step. Returns at once; start_step() on
  /// this rank then waits for what is agreed. More than once, or on several ranks, does no harm.
  void request_stop();
  /// The step before which all ranks stop, -1 as long as there is none.
  int64_t stop_step() const;

  /// What this rank does besides steps, until the end of the scope; an inner one hides the outer.
  class Activity {
   public:
    Activity(Member& member, std::string what);
    ~Activity();
    Activity(const Activity&) = delete;
    Activity& operator=(const Activity&) = delete;

   private:
    Member& member_;
    std::string before_;
  };
  /// "validating", "sampling", "writing a checkpoint"
  [[nodiscard]] Activity now(std::string what);
  /// This rank gets on: for parts of steps that can take long, such as micro-batches.
  void pulse();
  /// The work of a step of this rank took so many seconds, waiting for others not included.
  void worked(double seconds);

  /// Called by what waits for other ranks, every half `beat` or more often: tells a rank that waits from one
  /// that hangs. RunError when the job is ending; the one line is printed elsewhere.
  void check();
  /// Ends the job with this rank's message. Comes back only when there is one rank. `status`: 2 for
  /// UsageError, else 1. When the job is ending already, this process just takes part.
  void fail(const std::string& message, int status = 1);

  /// Compares every rank's facts with rank 0's; waits. All the same: returns; else the job ends with the
  /// first difference. All ranks call this and compare() in the same order.
  void agree(const Facts& facts);
  /// The same with a checksum of the parameters after a step: the job ends when one differs.
  void compare(int64_t step, uint64_t checksum);

  /// Rank 0: every rank's pace. Elsewhere, and alone: empty.
  std::vector<RankPace> paces() const;
  /// Rank 0: "rank 3 (host): 0.42 s of own work per step, the median is 0.20 s" for the slowest rank when it
  /// takes more than 1.3 times the median; else "".
  std::string slow_rank() const;

 private:
  std::unique_ptr<Member> member_;
  std::thread thread_;
};

/// A hash of the binary that runs, for agree().
std::string program_fingerprint();
