#include "dev/cuda_on_cpu/collectives.h"

#include <cstring>

namespace cuda_on_cpu {
namespace {
Meeting& meeting_of(Warp& warp, unsigned mask) {
  for (int i = 0; i < warp.meetings; ++i)
    if (warp.meeting[i].mask == mask) return warp.meeting[i];
  if (warp.meetings == Warp::kMeetings) fail("more than %d distinct masks in one warp", Warp::kMeetings);
  Meeting& meeting = warp.meeting[warp.meetings++];
  meeting.mask = mask;
  meeting.arrived = meeting.turn = 0;
  return meeting;
}

void check_mask(const Warp& warp, unsigned mask, const char* name) {
  const Thread& me = *current_thread;
  if ((mask >> me.lane & 1) == 0)
    fail("%s: lane %d calls with mask %08x, which does not name it", name, me.lane, mask);
  if ((mask & ~warp.alive) != 0)
    fail("%s: mask %08x names lanes %08x, which have returned or do not exist", name, mask,
         mask & ~warp.alive);
}

/// Everybody has come: wakes those who wait.
void dismiss(const Warp& warp, Meeting& meeting) {
  const int first = static_cast<int>(&warp - current_block->warp) * kLanes;
  const unsigned others = meeting.arrived & ~(1u << current_thread->lane);
  for (unsigned left = others; left != 0; left &= left - 1)
    make_ready(current_block->thread[first + __builtin_ctz(left)]);
  meeting.arrived = 0;
  meeting.turn ^= 1;
}
}  // namespace

const Deposits& meet(unsigned mask, const Operation& operation, Orders orders, const void* mine, size_t bytes,
                     void (*finish)(Deposits&)) {
  const Unobserved unobserved;
  Thread& me = *current_thread;
  Warp& warp = current_block->warp[me.warp];
  check_mask(warp, mask, operation.name);
  Meeting& meeting = meeting_of(warp, mask);
  if (meeting.arrived == 0)
    meeting.name = operation.name;
  else if (meeting.name != operation.name && std::strcmp(meeting.name, operation.name) != 0)
    fail("lanes of one warp diverge: lanes %08x wait in %s, lane %d comes to %s with the same mask %08x",
         meeting.arrived, meeting.name, me.lane, operation.name, mask);

  Deposits& deposits = meeting.deposits[meeting.turn];
  if (bytes != 0) std::memcpy(deposits.bytes[me.lane], mine, bytes);
  meeting.arrived |= 1u << me.lane;
  if (orders == Orders::memory) happens_before(&deposits);
  if (meeting.arrived == mask) {
    if (finish != nullptr) finish(deposits);
    dismiss(warp, meeting);
  } else {
    me.mask = mask;
    suspend(Thread::State::in_warp, operation);
  }
  if (orders == Orders::memory) happens_after(&deposits);
  return deposits;
}

namespace {
Barrier& barrier_of(int id, const Operation& operation) {
  if (id < 0 || id >= kNamedBarriers + kMaxWarpgroups) fail("%s: there is no barrier %d", operation.name, id);
  return current_block->barrier[id];
}

void release_if_complete(Block& b, int id) {
  Barrier& barrier = b.barrier[id];
  const int needed = barrier.expected != 0 ? barrier.expected : b.alive;
  if (barrier.arrived == 0 || barrier.arrived < needed) return;
  if (barrier.arrived > needed)
    fail("barrier %d: %d threads came, %d were expected", id, barrier.arrived, needed);
  barrier.arrived = barrier.expected = 0;
  ++barrier.generation;
  barrier.votes[barrier.generation & 1] = 0;
  for (int i = 0; i < b.threads; ++i) {
    Thread& t = b.thread[i];
    if (t.state != Thread::State::at_barrier || t.barrier != id) continue;
    --b.waiting_at_barriers;
    make_ready(t);
  }
}

/// Joins the round that barrier `id` is in, and says which one it is.
unsigned join(int id, int count, const Operation& operation) {
  if (count % kLanes != 0) fail("%s: barrier %d for %d threads, not whole warps", operation.name, id, count);
  Barrier& barrier = barrier_of(id, operation);
  if (barrier.arrived != 0 && barrier.expected != count)
    fail("%s: barrier %d is called for %d threads and for %d", operation.name, id, barrier.expected, count);
  barrier.expected = count;
  ++barrier.arrived;
  happens_before(&barrier.tokens[barrier.generation & 1]);
  return barrier.generation;
}
}  // namespace

int barrier(int id, int count, const Operation& operation, int vote) {
  const Unobserved unobserved;
  Block& b = *current_block;
  Barrier& barrier = barrier_of(id, operation);
  const unsigned generation = join(id, count, operation);
  barrier.votes[generation & 1] += vote;
  current_thread->barrier = id;
  current_thread->state = Thread::State::at_barrier;
  ++b.waiting_at_barriers;
  release_if_complete(b, id);
  if (current_thread->state == Thread::State::at_barrier)
    suspend(Thread::State::at_barrier, operation);
  else if (b.order.kind != ThreadOrder::Kind::forward)  // else the last to come simply goes on
    suspend(Thread::State::ready, operation);
  happens_after(&barrier.tokens[generation & 1]);
  return barrier.votes[generation & 1];
}

void arrive(int id, int count, const Operation& operation) {
  const Unobserved unobserved;
  join(id, count, operation);
  release_if_complete(*current_block, id);
}

void warpgroup_barrier(const Operation& operation) {
  barrier(kNamedBarriers + current_thread->warp / 4, 128, operation);
}

void release_barrier_of_all(Block& block) {
  release_if_complete(block, 0);
}

void wait_until(const std::function<bool()>& condition, const Operation& operation,
                std::function<std::string()> explain) {
  const Unobserved unobserved;
  if (condition()) return;
  Thread& me = *current_thread;
  me.until = &condition;
  me.explain = std::move(explain);
  ++current_block->polling;
  suspend(Thread::State::polling, operation);
}

uint32_t shared_offset(const void* address, const char* operation) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(address) - current_block->shared;
  if (offset < 0 || static_cast<size_t>(offset) >= current_block->shared_bytes)
    fail("%s: address %p is not in the %zu bytes of dynamic shared memory", operation, address,
         current_block->shared_bytes);
  return static_cast<uint32_t>(offset);
}

}  // namespace cuda_on_cpu
