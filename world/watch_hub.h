// The thread of rank 0: hears all ranks, its own included, lets the judge decide, and tells everybody.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "world/watch_judge.h"
#include "world/watch_member.h"
#include "world/watch_socket.h"

/// Where the other ranks come in.
struct Door {
  Door();
  /// What they need: where rank 0 listens, and a word that strangers do not know.
  std::string invitation() const;

  const Listener listener;
  const Endpoint endpoint;
  const std::string token;
};

class Hub {
 public:
  /// The time for all to come begins.
  Hub(Member& member, const Door& door);
  /// Until all have said goodbye, or the end of the process.
  void run();

 private:
  struct Stranger {
    Connection connection;
    double since;
  };
  struct Guest {
    Connection connection;
    Endpoint endpoint;
  };

  void wait(double until);
  void look_at_clock();
  void let_in();
  void seat(Stranger& stranger, const nlohmann::json& hello);
  void hear_all();
  void hear(int rank, const nlohmann::json& message);
  void beat();
  void all_are_here();
  void goodbye(int rank);
  void ask_where_all_are();
  void is_at(int rank, int64_t step);
  void tell(int rank, const nlohmann::json& message);
  void tell_all(const nlohmann::json& message);
  bool all_left() const;
  [[noreturn]] void end(const Verdict& verdict);

  Member& member_;
  const WatchOptions& options_;
  const Door& door_;
  std::vector<Stranger> strangers_;
  std::vector<Guest> guests_;  // by rank; rank 0 has no connection
  double now_, next_beat_;
  Judge judge_;
  bool all_here_ = false, abandoned_ = false;
  // Where to stop: asked once; the step after the furthest that anybody has started.
  bool stopping_ = false;
  std::set<int> unanswered_;
  int64_t furthest_ = -1;
};
