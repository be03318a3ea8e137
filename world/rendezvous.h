// Ranks that find each other over TCP, without MPI: rank 0 listens, the others connect to it, and then they
// tell each other short texts. For what is said once at the start, such as the id of an NCCL communicator.
// No encryption and no password: for the network inside a cluster.
#pragma once

#include <string>
#include <vector>

class Rendezvous {
 public:
  /// Rank 0 listens at `port` of all its addresses; the others try `address`, a name or a number, until it
  /// answers. Comes back when all are here, else throws RunError after `patience` seconds, naming the ranks
  /// that are missing, and at once when two do not agree on how many they are or on who is who.
  Rendezvous(int rank, int size, const std::string& address, int port, double patience = 300);
  ~Rendezvous();
  Rendezvous(const Rendezvous&) = delete;
  Rendezvous& operator=(const Rendezvous&) = delete;

  /// What every rank says, by rank; up to a mebibyte each. All ranks call it. Waits for them; RunError that
  /// names the rank when one has gone or keeps the others waiting for longer than the patience.
  std::vector<std::string> gather(const std::string& mine);
  /// What rank 0 says; from the others `text` is not looked at.
  std::string broadcast(const std::string& text) { return gather(rank_ == 0 ? text : "").front(); }

 private:
  void listen_for_others(int port);
  void connect_to(const std::string& address, int port);
  void close_all();

  int rank_, size_;
  double patience_;  // seconds
  /// By rank at rank 0, its own is unused; the others have one, to rank 0.
  std::vector<int> sockets_;
};
