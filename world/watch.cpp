#include "world/watch.h"

#include <fmt/format.h>

#include <csignal>
#include <exception>
#include <utility>

#include "files.h"
#include "world/watch_hub.h"
#include "world/watch_link.h"
#include "world/watch_member.h"

namespace {
/// A thread that takes no signals: they belong to the main thread.
template <typename Work>
std::thread start_thread(Work work) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread thread(std::move(work));
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return thread;
}
}  // namespace

Watch::Watch() : member_(std::make_unique<Member>(0, 1, WatchOptions{})) {}

Watch::Watch(int rank, int ranks, const Broadcast& broadcast_from_rank0, const WatchOptions& options)
    : member_(std::make_unique<Member>(rank, ranks, options)) {
  if (ranks == 1) return;
  if (rank == 0) {
    const auto door = std::make_shared<Door>();
    broadcast_from_rank0(door->invitation());
    thread_ = start_thread([this, door] { Hub(*member_, *door).run(); });
  } else {
    const auto link = std::make_shared<Link>(*member_, broadcast_from_rank0(""));
    thread_ = start_thread([link] { link->run(); });
  }
  try {
    member_->wait_for_all();
  } catch (...) {
    thread_.join();
    throw;
  }
}

Watch::~Watch() {
  if (!thread_.joinable()) return;
  member_->say(std::uncaught_exceptions() > 0 ? "abandon" : "bye");
  thread_.join();
}

bool Watch::start_step(int64_t step) {
  return member_->start_step(step);
}

void Watch::request_stop() {
  member_->request_stop();
}

int64_t Watch::stop_step() const {
  return member_->stop_step();
}

Watch::Activity::Activity(Member& member, std::string what)
    : member_(member), before_(member.do_now(std::move(what))) {}

Watch::Activity::~Activity() {
  member_.do_now(std::move(before_));
}

Watch::Activity Watch::now(std::string what) {
  return {*member_, std::move(what)};
}

void Watch::pulse() {
  member_->pulse();
}

void Watch::worked(double seconds) {
  member_->worked(seconds);
}

void Watch::check() {
  member_->check();
}

void Watch::fail(const std::string& message, int status) {
  if (!member_->alone()) member_->fail(message, status);
}

void Watch::agree(const Facts& facts) {
  member_->ask({.step = -1, .facts = facts});
}

void Watch::compare(int64_t step, uint64_t checksum) {
  member_->ask({.step = step, .facts = {{"checksum", fmt::format("{:016x}", checksum)}}});
}

std::vector<RankPace> Watch::paces() const {
  return member_->paces();
}

std::string Watch::slow_rank() const {
  return slowest(paces());
}

std::string program_fingerprint() {
  return fmt::format("{:016x}", hash_file("/proc/self/exe"));
}
