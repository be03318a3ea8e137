#include "dev/cuda_on_cpu/async.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "dev/cuda_on_cpu/block.h"

namespace cuda_on_cpu {
namespace {
/// How many of the oldest entries belong to all but the newest `still_going` groups; forgets those groups.
size_t take_groups(std::vector<size_t>& groups, size_t still_going) {
  if (groups.size() <= still_going) return 0;
  const auto end = groups.end() - static_cast<ptrdiff_t>(still_going);
  size_t count = 0;
  for (auto group = groups.begin(); group != end; ++group) count += *group;
  groups.erase(groups.begin(), end);
  return count;
}
}  // namespace

void CopyQueue::start(void* to_shared, const void* from, size_t bytes, size_t valid) {
  // A first look at both ends, so that the sanitizers name the line that starts a bad copy.
  if constexpr (kAsan || kTsan)
    for (size_t i = 0; i < valid; ++i) static_cast<void>(static_cast<const volatile char*>(from)[i]);
  std::memset(to_shared, kPoisonByte, bytes);
  copies_.push_back({to_shared, from, bytes, valid});
  ++open_;
}

void CopyQueue::commit() {
  groups_.push_back(open_);
  open_ = 0;
}

void CopyQueue::wait(size_t still_going) {
  const size_t count = take_groups(groups_, still_going);
  for (size_t i = 0; i < count; ++i) {
    const Copy& copy = copies_[i];
    std::memcpy(copy.to, copy.from, copy.valid);
    std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
  }
  copies_.erase(copies_.begin(), copies_.begin() + static_cast<ptrdiff_t>(count));
}

void CopyQueue::clear() {
  copies_.clear();
  groups_.clear();
  open_ = 0;
}

ProductQueue::Registers& ProductQueue::find(float* registers) {
  return *std::find_if(registers_.begin(), registers_.end(),
                       [&](const Registers& r) { return r.at == registers; });
}

void ProductQueue::start(float* registers, int count, Accumulate accumulate) {
  if (std::none_of(registers_.begin(), registers_.end(),
                   [&](const Registers& r) { return r.at == registers; })) {
    registers_.push_back({registers, std::vector<float>(registers, registers + count), 0});
    std::fill_n(registers, count, std::numeric_limits<float>::quiet_NaN());
  }
  ++find(registers).pending;
  products_.push_back({registers, std::move(accumulate)});
  ++open_;
}

void ProductQueue::commit() {
  groups_.push_back(open_);
  open_ = 0;
}

void ProductQueue::wait(size_t still_going) {
  const size_t count = take_groups(groups_, still_going);
  for (size_t i = 0; i < count; ++i) {
    Registers& to = find(products_[i].registers);
    products_[i].accumulate(to.sums.data());
    if (--to.pending > 0) continue;
    std::copy(to.sums.begin(), to.sums.end(), to.at);
    registers_.erase(registers_.begin() + (&to - registers_.data()));
  }
  products_.erase(products_.begin(), products_.begin() + static_cast<ptrdiff_t>(count));
}

void ProductQueue::clear() {
  registers_.clear();
  products_.clear();
  groups_.clear();
  open_ = 0;
  fenced = false;
}

}  // namespace cuda_on_cpu
