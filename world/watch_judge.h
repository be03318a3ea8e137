// What rank 0 makes of what it hears: who is to blame, and the one line that says so. No sockets, no threads
// and no clock: times are handed in, seconds from any origin.
#pragma once

#include <cstdint>
#include <deque>
#include <limits>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "world/watch.h"

/// What a rank says of itself about once a second; lengths of time, so that clocks need not agree.
struct Beat {
  int64_t step = -1;          // started last; -1: none
  std::string activity = {};  // besides steps; empty: none
  bool waiting = false;       // for other ranks
  double quiet = 0;           // seconds since it last got on
  double longest = 0;         // seconds between two signs of getting on in a step, so far; 0: no two yet
  double work = 0;            // seconds of own work, in all
  int64_t worked = 0;         // steps that they went into
};
void to_json(nlohmann::json& json, const Beat& beat);
void from_json(const nlohmann::json& json, Beat& beat);

/// The end of the job. An empty line: somebody else has said why.
struct Verdict {
  std::string line;  // without "train_gpt: error: "
  int status;
};

/// Which process a rank is.
struct Identity {
  int rank = 0;
  std::string host;
  int64_t process = 0;
};
/// "rank 2 (host, process 123)"
std::string describe(const Identity& who);
/// "rank 2", "ranks 0-2, 5"; sorted
std::string rank_names(const std::vector<int>& ranks);
/// "in step 17", "in step 17, validating", "before the first step"
std::string place(int64_t step, const std::string& activity);
/// A message as one line that fits a screen.
std::string one_line(std::string text);
/// The lines about processes that cannot speak for themselves.
Verdict ended_without_a_word(const std::string& who, const std::string& where);
Verdict silent(const Identity& who, double seconds, const std::string& where);

/// What is compared between ranks: facts at the start (step -1), or one checksum after a step.
struct Answer {
  int64_t step = -1;
  Watch::Facts facts;
};

class Judge {
 public:
  Judge(int ranks, const WatchOptions& options, double now);

  void joined(const Identity& who, double now);
  bool has_joined(int rank) const { return of(rank).joined; }
  bool all_joined() const;
  const Identity& who(int rank) const { return of(rank).who; }
  void beat(int rank, const Beat& beat, double now);
  /// A rank threw. The verdict waits a moment for others that throw the same.
  void failed(int rank, const std::string& message, int status, double now);
  /// The connections to these ranks closed; those that said goodbye are no loss.
  void lost(const std::vector<int>& ranks, double now);
  /// A rank said goodbye.
  void left(int rank) { of(rank).left = true; }
  bool has_left(int rank) const { return of(rank).left; }
  /// True when all ranks have answered and agree; the next round begins.
  bool answered(int rank, Answer answer);
  /// Looks for ranks that are late, silent or hang. To be called about every `beat`.
  void tick(double now);
  /// This process itself was stopped for so long, until now: what it did not hear meanwhile is nobody's
  /// fault.
  void was_stopped(double seconds, double now);

  const std::optional<Verdict>& verdict() const { return verdict_; }
  std::vector<RankPace> paces() const;

 private:
  struct Failure {
    std::string message;
    int status;
  };
  struct Sample {
    double work;
    int64_t worked;
  };
  struct State {
    Identity who;
    bool joined = false, left = false;
    double heard = 0;
    Beat beat;
    std::deque<Sample> samples;  // of the last beats
    std::optional<Failure> failure;
    std::optional<Answer> answer;
  };

  State& of(int rank) { return states_[static_cast<size_t>(rank)]; }
  const State& of(int rank) const { return states_[static_cast<size_t>(rank)]; }
  void decide(Verdict verdict);
  double allowance(const State& state) const;
  int64_t step() const;
  void judge_failures();
  void judge_late();
  void judge_silence(double now);
  void judge_hangs();
  void judge_deadlock();
  void nobody_gets_on();
  std::vector<const State*> present() const;
  bool judge_answers();
  void facts_differ(const std::vector<const State*>& ranks);
  void checksums_differ(const std::vector<const State*>& ranks);

  WatchOptions options_;
  double start_;
  std::vector<State> states_;
  std::optional<int> first_failure_;  // the rank
  double failing_since_ = 0;
  double away_until_ = std::numeric_limits<double>::lowest();  // after a stop so long that the others may
                                                               // have given this process up
  std::optional<Verdict> verdict_;
};

/// The slowest of `paces` in words when it takes more than 1.3 times the median, else "".
std::string slowest(const std::vector<RankPace>& paces);
