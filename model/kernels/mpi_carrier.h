// Carries out exchanges between the memories of hosts over MPI, in the thread that calls it.
#pragma once

#include <algorithm>
#include <array>
#include <functional>
#include <span>
#include <vector>

#include "model/kernels/comm_exchange.h"
#include "model/kernels/mpi_messages.h"

class MpiCarrier {
 public:
  /// Messages have up to `parcel` bytes; `idle` is called again and again while they are waited for, and may
  /// throw.
  MpiCarrier(int rank, int ranks, int64_t parcel, std::function<void()> idle)
      : rank_(rank), ranks_(ranks), parcel_(parcel), idle_(std::move(idle)) {}

  /// Takes the memory for exchanges in which no rank owns more than `bytes`.
  void reserve(int64_t bytes);
  /// Comes back when the exchange is done.
  void run(Collective exchange, std::span<const Part> parts);

 private:
  using Parcels = std::vector<Parcel>;
  /// What travels, by owner; a sum has one list, which everybody sends and receives.
  struct Plan {
    Collective exchange;
    std::vector<Parcels> of;
    const Parcels& sent(int from, int to) const {
      return of[exchange == Collective::sum
                    ? 0
                    : static_cast<size_t>(exchange == Collective::reduce_scatter ? to : from)];
    }
  };
  /// One parcel for and from every other rank.
  struct Round {
    MpiMessages messages;
    std::vector<char> memory;
    std::vector<char*> received;  // by rank; null: nothing came, or it is where it belongs
  };

  void post(const Plan& plan, size_t k);
  void complete(const Plan& plan, size_t k);

  const int rank_, ranks_;
  const int64_t parcel_;
  const std::function<void()> idle_;
  std::array<Round, 2> rounds_;  // two are under way at a time
};
