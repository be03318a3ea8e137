#include "model/kernels/mpi_carrier.h"

#include <utility>

namespace {
/// Room for a parcel: each begins at a cache line.
int64_t room_for(int64_t bytes) {
  return (bytes + 63) / 64 * 64;
}
}  // namespace

void MpiCarrier::reserve(int64_t bytes) {
  const auto need = static_cast<size_t>(2 * (ranks_ - 1) * room_for(std::min(parcel_, bytes)));
  for (Round& round : rounds_)
    if (round.memory.size() < need) round.memory.resize(need);
}

void MpiCarrier::run(Collective exchange, std::span<const Part> parts) {
  if (ranks_ == 1) return;
  Plan plan{exchange, std::vector<Parcels>(exchange == Collective::sum ? 1 : static_cast<size_t>(ranks_))};
  int64_t most = 0;
  size_t rounds = 0;
  for (size_t owner = 0; owner < plan.of.size(); ++owner) {
    std::vector<Tensor> tensors;
    int64_t bytes = 0;
    for (const Part& part : parts)
      if (exchange == Collective::sum || part.owner == static_cast<int>(owner)) {
        tensors.push_back(part.tensor);
        bytes += part.tensor.bytes();
      }
    plan.of[owner] = cut(tensors, parcel_);
    most = std::max(most, bytes);
    rounds = std::max(rounds, plan.of[owner].size());
  }
  reserve(most);
  if (rounds > 0) post(plan, 0);
  for (size_t k = 0; k < rounds; ++k) {
    if (k + 1 < rounds) post(plan, k + 1);
    complete(plan, k);
  }
}

/// Starts the messages of round k. What lies in one run of memory travels from there and, unless it is to be
/// added, to there.
void MpiCarrier::post(const Plan& plan, size_t k) {
  Round& round = rounds_[k % 2];
  char* free = round.memory.data();
  const auto take = [&](int64_t bytes) { return std::exchange(free, free + room_for(bytes)); };
  round.received.assign(static_cast<size_t>(ranks_), nullptr);
  for (int i = 1; i < ranks_; ++i) {
    const int from = (rank_ + ranks_ - i) % ranks_;
    const Parcels& parcels = plan.sent(from, rank_);
    if (k >= parcels.size()) continue;
    char* to = plan.exchange == Collective::all_gather ? in_one_run(parcels[k]) : nullptr;
    if (to == nullptr) round.received[static_cast<size_t>(from)] = to = take(parcels[k].bytes);
    round.messages.receive(to, parcels[k].bytes, from);
  }
  const Parcel* packed = nullptr;  // all get the same one, except in a reduce-scatter
  char* at = nullptr;
  for (int i = 1; i < ranks_; ++i) {
    const int to = (rank_ + i) % ranks_;
    const Parcels& parcels = plan.sent(rank_, to);
    if (k >= parcels.size()) continue;
    if (packed != &parcels[k]) {
      packed = &parcels[k];
      at = in_one_run(*packed);
      if (at == nullptr) pack(*packed, at = take(packed->bytes));
    }
    round.messages.send(at, packed->bytes, to);
  }
}

/// Waits for round k and puts what came where it belongs.
void MpiCarrier::complete(const Plan& plan, size_t k) {
  Round& round = rounds_[k % 2];
  round.messages.wait(idle_);
  if (plan.exchange == Collective::all_gather) {
    for (int from = 0; from < ranks_; ++from)
      if (const char* copy = round.received[static_cast<size_t>(from)])
        unpack(plan.sent(from, rank_)[k], copy);
    return;
  }
  // What everybody sends to me is what I add to.
  const Parcels& mine = plan.sent((rank_ + 1) % ranks_, rank_);
  if (k < mine.size()) add_in_order(mine[k], round.received);
}
