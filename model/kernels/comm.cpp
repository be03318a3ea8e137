#include "model/kernels/comm.h"

// A single process: whatever was asked for has happened.
Comm::Ticket Comm::start_sum(std::span<const Tensor>) {
  return 0;
}

Comm::Ticket Comm::start_reduce_scatter(std::span<const Part>) {
  return 0;
}

Comm::Ticket Comm::start_all_gather(std::span<const Part>) {
  return 0;
}

Comm::Ticket Comm::start_broadcast(const Tensor&, int) {
  return 0;
}
