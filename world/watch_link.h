// The thread of the ranks above 0: keeps the connection to rank 0, and finds out who speaks when rank 0 is
// lost.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "world/watch_member.h"

class Link {
 public:
  /// Connects and says who it is. RunError when nobody answers.
  Link(Member& member, const std::string& invitation);
  /// Until goodbye, or the end of the process.
  void run();

 private:
  struct Peer {
    Identity who;
    Endpoint endpoint;
  };

  void wait(double until);
  void speak();
  void hear();
  void hear_word(const nlohmann::json& message);
  void serve_peers();
  bool still_here(double now);
  [[noreturn]] void rank_0_is_lost(const Verdict& verdict);
  bool a_lower_rank_lives();
  bool one_lives(int first, int last);
  void ask_whether_alive(const Peer& peer);

  Member& member_;
  std::string token_;
  Listener listener_;  // where ranks ask each other whether they are there, once rank 0 is not
  Connection rank_0_;
  std::vector<Connection> callers_;
  int answered_callers_ = 0;
  std::vector<Peer> peers_;  // by rank, once all are here
  Beat beat_of_rank_0_;
  double heard_, woke_, next_beat_;
  double leaving_since_ = -1;
  bool abandoned_ = false, refused_ = false;
};
