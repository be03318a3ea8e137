#include "world/watch_member.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <utility>

#include "error.h"

using nlohmann::json;

namespace {
constexpr unsigned kStuck = 3;  // seconds that a last flush may take: nobody may read the pipe any more

RunError job_is_ending() {
  return RunError("the job is ending, another rank, see its line");
}

/// Without waiting for a lock that a thread holds which will never go on.
void flush_output() {
  if (ftrylockfile(stdout) != 0) return;
  fflush_unlocked(stdout);
  funlockfile(stdout);
}

/// From here on the process ends by itself, whatever holds up the next line.
void end_even_if_stuck() {
  std::signal(SIGALRM, SIG_DFL);
  alarm(kStuck);
}
}  // namespace

void say_error(const std::string& line) {
  end_even_if_stuck();
  flush_output();
  const std::string text = fmt::format("train_gpt: error: {}\n", line);
  // In one piece, so that nothing gets in between.
  const ssize_t ignored = write(STDERR_FILENO, text.data(), text.size());
  (void)ignored;  // there is nobody else to tell
  alarm(0);
}

Member::Member(int rank, int ranks, const WatchOptions& options)
    : rank_(rank), ranks_(ranks), options_(options), got_on_(clock_seconds()) {}

// ------------------------------------------------------------------------------------------------- the main
// thread
bool Member::start_step(int64_t step) {
  {
    const std::lock_guard lock(mutex_);
    get_on(clock_seconds());
  }
  if (ending_) throw job_is_ending();
  started_ = step;
  if (gate_ == kHold) wait([&] { return gate_ != kHold; });
  return step < gate_;
}

void Member::request_stop() {
  // Holds this rank at once; the others when rank 0 tells them.
  int64_t open = kOpen;
  if (gate_.compare_exchange_strong(open, alone() ? started_ + 1 : kHold) && !alone()) say("stop");
}

int64_t Member::stop_step() const {
  const int64_t gate = gate_;
  return gate == kOpen || gate == kHold ? -1 : gate;
}

/// Waits here, as others may have to wait for us: RunError when the job is ending.
template <typename Condition>
void Member::wait(Condition condition) {
  std::unique_lock lock(mutex_);
  ++held_;
  changed_.wait(lock, [&] { return ending_ || condition(); });
  --held_;
  got_on_ = clock_seconds();
  if (ending_) throw job_is_ending();
}

/// With the lock. The time spent waiting for others is no measure of this rank's own pace.
void Member::get_on(double now) {
  if (activity_.empty() && started_ >= 0)
    longest_ = std::max(longest_, now - std::max<double>(got_on_, checked_));
  got_on_ = now;
}

std::string Member::do_now(std::string activity) {
  std::string before;
  {
    const std::lock_guard lock(mutex_);
    get_on(clock_seconds());
    before = std::exchange(activity_, std::move(activity));
  }
  // At once: if this rank is lost the next moment, rank 0 knows in what.
  if (!alone()) mailbox_.post({{"say", "beat"}, {"beat", report()}});
  return before;
}

void Member::pulse() {
  const std::lock_guard lock(mutex_);
  get_on(clock_seconds());
}

void Member::worked(double seconds) {
  const std::lock_guard lock(mutex_);
  get_on(clock_seconds());
  work_ += seconds;
  ++worked_;
}

void Member::check() {
  checked_ = clock_seconds();
  if (ending_) throw job_is_ending();
}

void Member::fail(const std::string& message, int status) {
  if (ending_)
    say("parked");
  else
    mailbox_.post({{"say", "fail"}, {"message", one_line(message)}, {"status", status}});
  park();
}

void Member::park() {
  std::unique_lock lock(mutex_);
  parked_ = true;
  changed_.notify_all();
  while (true) changed_.wait(lock);
}

void Member::ask(const Answer& answer) {
  if (alone()) return;
  const int64_t round = ++asked_;  // only the main thread asks
  mailbox_.post({{"say", "answer"}, {"step", answer.step}, {"facts", answer.facts}});
  wait([&] { return agreed_ >= round; });
}

void Member::wait_for_all() {
  try {
    wait([&] { return all_here_ || !refused_.empty(); });
  } catch (const RunError&) {
    park();  // there is nobody yet to catch it and call fail()
  }
  const std::lock_guard lock(mutex_);
  if (!refused_.empty()) throw RunError(refused_);
}

void Member::say(const char* word) {
  mailbox_.post({{"say", word}});
}

std::vector<RankPace> Member::paces() const {
  const std::lock_guard lock(mutex_);
  return paces_;
}

// ------------------------------------------------------------------------------------------------------ the
// thread
Beat Member::report() const {
  const std::lock_guard lock(mutex_);
  const double now = clock_seconds(), checked = checked_;
  const bool waiting = held_ > 0 || parked_ || (checked > got_on_ && now - checked < 2 * options_.beat);
  return {.step = started_,
          .activity = activity_,
          .waiting = waiting,
          .quiet = now - (waiting ? got_on_ : std::max(got_on_, checked)),
          .longest = longest_,
          .work = work_,
          .worked = worked_};
}

void Member::hear(const json& message) {
  const std::string word = message.at("say");
  if (word == "hold") {
    gate_ = kHold;
    mailbox_.post({{"say", "started"}, {"step", started_.load()}});
    return;
  }
  const std::lock_guard lock(mutex_);
  if (word == "stop at") gate_ = message.at("step").get<int64_t>();
  if (word == "agreed") ++agreed_;
  if (word == "all here") all_here_ = true;
  changed_.notify_all();
}

void Member::set_paces(std::vector<RankPace> paces) {
  const std::lock_guard lock(mutex_);
  paces_ = std::move(paces);
}

void Member::set_refused(const std::string& why) {
  const std::lock_guard lock(mutex_);
  refused_ = why;
  changed_.notify_all();
}

void Member::begin_ending() {
  const std::lock_guard lock(mutex_);
  ending_ = true;
  changed_.notify_all();
}

void Member::end_process(int status) {
  {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, std::chrono::duration<double>(options_.grace), [&] { return parked_.load(); });
  }
  end_even_if_stuck();
  flush_output();
  _exit(status);
}
