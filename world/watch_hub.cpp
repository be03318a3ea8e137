#include "world/watch_hub.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <random>

#include "json_text.h"

using nlohmann::json;

namespace {
constexpr double kHello = 5;       // seconds that a stranger has to say who it is
constexpr size_t kStrangers = 64;  // beyond the ranks that are to come

/// 128 bits that nobody can guess.
std::string random_token() {
  std::random_device random;
  return fmt::format("{:08x}{:08x}{:08x}{:08x}", random(), random(), random(), random());
}
}  // namespace

Door::Door() : endpoint{own_addresses(), listener.port()}, token(random_token()) {}

std::string Door::invitation() const {
  return json_text(json{{"endpoint", endpoint}, {"token", token}});
}

Hub::Hub(Member& member, const Door& door)
    : member_(member),
      options_(member.options()),
      door_(door),
      guests_(static_cast<size_t>(member.ranks())),
      now_(clock_seconds()),
      next_beat_(now_),
      judge_(member.ranks(), options_, now_) {
  guests_[0].endpoint = door.endpoint;
  judge_.joined({0, host_name(), getpid()}, now_);
}

void Hub::run() {
  while (!abandoned_ && !all_left()) {
    wait(next_beat_);
    let_in();
    hear_all();
    if (now_ >= next_beat_) beat();
    if (judge_.verdict()) end(*judge_.verdict());
  }
}

void Hub::wait(double until) {
  std::vector<pollfd> descriptors = {{member_.mailbox().descriptor(), POLLIN, 0},
                                     {door_.listener.socket(), POLLIN, 0}};
  const auto add = [&](const Connection& connection) {
    if (connection.open()) descriptors.push_back({connection.socket(), connection.events(), 0});
  };
  for (const Stranger& stranger : strangers_) add(stranger.connection);
  for (const Guest& guest : guests_) add(guest.connection);
  wait_for(descriptors, until - clock_seconds());
  look_at_clock();
}

/// The time that the judge is given, and whether this process itself was stopped since the last look.
void Hub::look_at_clock() {
  const double now = clock_seconds();
  const double away = now - now_ - options_.beat;
  if (away > options_.silence / 2) judge_.was_stopped(away, now);
  now_ = now;
}

// -------------------------------------------------------------------------------------------------- who
// comes
void Hub::let_in() {
  for (Connection caller = door_.listener.accept(); caller.open(); caller = door_.listener.accept())
    if (strangers_.size() < guests_.size() + kStrangers) strangers_.push_back({std::move(caller), now_});
  for (Stranger& stranger : strangers_) {
    const std::vector<json> messages = stranger.connection.receive();
    try {
      if (!messages.empty()) seat(stranger, messages.front());
    } catch (const json::exception&) {
      stranger.connection.close();
    }
    if (now_ - stranger.since > kHello) stranger.connection.close();
  }
  std::erase_if(strangers_, [](const Stranger& stranger) { return !stranger.connection.open(); });
  if (!all_here_ && judge_.all_joined()) all_are_here();
}

/// A rank of this job gets its place, with what it says later; everybody else is sent away.
void Hub::seat(Stranger& stranger, const json& hello) {
  const int rank = hello.at("rank");
  const char* why = nullptr;
  if (hello.at("say") != "hello" || hello.at("token") != door_.token)
    why = "it belongs to another job";
  else if (rank < 1 || rank >= member_.ranks())
    why = "the job has fewer ranks";
  else if (judge_.has_joined(rank))
    why = "another process is this rank already";
  if (why != nullptr) {
    stranger.connection.send({{"say", "refused"}, {"why", why}});
    stranger.connection.close();
    return;
  }
  Guest& guest = guests_[static_cast<size_t>(rank)];
  guest.endpoint = hello.at("endpoint");
  judge_.joined({rank, hello.at("host"), hello.at("process")}, now_);
  guest.connection = std::move(stranger.connection);
  guest.connection.trust();
}

void Hub::all_are_here() {
  all_here_ = true;
  json ranks = json::array();
  for (int rank = 0; rank < member_.ranks(); ++rank) {
    const Identity& who = judge_.who(rank);
    ranks.push_back({{"host", who.host},
                     {"process", who.process},
                     {"endpoint", guests_[static_cast<size_t>(rank)].endpoint}});
  }
  tell_all({{"say", "all here"}, {"ranks", ranks}});
}

// ------------------------------------------------------------------------------------------------ what they
// say
void Hub::hear_all() {
  std::vector<int> closed;
  for (int rank = 1; rank < member_.ranks(); ++rank) {
    Connection& connection = guests_[static_cast<size_t>(rank)].connection;
    if (!connection.open()) continue;
    connection.send_rest();
    for (const json& message : connection.receive()) {
      try {
        hear(rank, message);
      } catch (const json::exception&) {
        connection.close();  // another program
      }
    }
    if (!connection.open()) closed.push_back(rank);
  }
  look_at_clock();  // before anybody is blamed for a connection that closed
  if (!closed.empty()) {
    judge_.beat(0, member_.report(), now_);  // so that the line names the step that the job is in
    judge_.lost(closed, now_);
  }
  for (const json& message : member_.mailbox().take()) hear(0, message);
}

void Hub::hear(int rank, const json& message) {
  const std::string word = message.at("say");
  if (word == "beat") judge_.beat(rank, message.at("beat"), now_);
  if (word == "fail") judge_.failed(rank, message.at("message"), message.at("status"), now_);
  if (word == "answer" && judge_.answered(rank, {message.at("step"), message.at("facts")}))
    tell_all({{"say", "agreed"}});
  if (word == "stop") ask_where_all_are();
  if (word == "started") is_at(rank, message.at("step"));
  if (word == "bye") goodbye(rank);
  if (word == "abandon") abandoned_ = true;
}

void Hub::beat() {
  next_beat_ = now_ + options_.beat;
  const Beat own = member_.report();
  judge_.beat(0, own, now_);
  judge_.tick(now_);
  member_.set_paces(judge_.paces());
  for (int rank = 1; rank < member_.ranks(); ++rank) tell(rank, {{"say", "beat"}, {"beat", own}});
}

void Hub::goodbye(int rank) {
  judge_.left(rank);
  guests_[static_cast<size_t>(rank)].connection.close();
  is_at(rank, -1);
}

bool Hub::all_left() const {
  for (int rank = 0; rank < member_.ranks(); ++rank)
    if (!judge_.has_left(rank)) return false;
  return true;
}

// ----------------------------------------------------------------------------------------------------
// stopping
/// First all are held before their next step, then told which the last one is: nobody can be past it.
void Hub::ask_where_all_are() {
  if (stopping_) return;
  stopping_ = true;
  for (int rank = 0; rank < member_.ranks(); ++rank)
    if (!judge_.has_left(rank)) unanswered_.insert(rank);
  tell_all({{"say", "hold"}});
}

void Hub::is_at(int rank, int64_t step) {
  furthest_ = std::max(furthest_, step);
  if (unanswered_.erase(rank) == 1 && unanswered_.empty())
    tell_all({{"say", "stop at"}, {"step", furthest_ + 1}});
}

void Hub::tell(int rank, const json& message) {
  if (rank == 0)
    member_.hear(message);
  else
    guests_[static_cast<size_t>(rank)].connection.send(message);
}

void Hub::tell_all(const json& message) {
  for (int rank = 0; rank < member_.ranks(); ++rank) tell(rank, message);
}

/// First the line, then the end of the others, so that nobody's consequences are printed before the cause.
void Hub::end(const Verdict& verdict) {
  if (!verdict.line.empty()) say_error(verdict.line);
  member_.begin_ending();
  const auto tell_end = [&](Connection& connection) {
    connection.send({{"say", "end"}, {"status", verdict.status}});
    connection.finish_sending();
  };
  for (Guest& guest : guests_) tell_end(guest.connection);
  for (Stranger& stranger : strangers_) tell_end(stranger.connection);
  // Ends after the others have, or they would take this process for lost.
  const double until = clock_seconds() + 2 * options_.grace;
  const auto somebody_left = [&] {
    return std::any_of(guests_.begin(), guests_.end(),
                       [](const Guest& guest) { return guest.connection.open(); });
  };
  while (somebody_left() && clock_seconds() < until) {
    wait(until);
    member_.mailbox().take();
    for (Guest& guest : guests_) guest.connection.receive();
    for (Stranger& stranger : strangers_) stranger.connection.receive();
    for (Connection caller = door_.listener.accept(); caller.open(); caller = door_.listener.accept()) {
      tell_end(caller);
      strangers_.push_back({std::move(caller), now_});
    }
  }
  member_.end_process(verdict.status);
}
