// Messages under way between ranks, over MPI.
#pragma once

#include <mpi.h>

#include <cstdint>
#include <functional>
#include <vector>

class MpiMessages {
 public:
  /// Start a message of up to 2^30 bytes. Between two ranks they arrive in the order of the calls.
  void receive(char* to, int64_t bytes, int from);
  void send(const char* from, int64_t bytes, int to);
  /// Waits for all of them; `idle` is called between looks, and may throw. RunError that names the rank when
  /// one fails, or has another length than the receiver expected.
  void wait(const std::function<void()>& idle);

 private:
  struct Other {
    int rank;
    int64_t expected;  // bytes; -1 for one that is sent
  };
  MPI_Request& add(int rank, int64_t expected);
  void check_one_by_one(const std::vector<MPI_Status>& statuses) const;
  std::vector<MPI_Request> requests_;
  std::vector<Other> others_;  // of each request
};
