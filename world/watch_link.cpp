#include "world/watch_link.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <thread>

#include "error.h"
#include "json_text.h"

using nlohmann::json;

Link::Link(Member& member, const std::string& invitation) : member_(member) {
  const json invited = parse_json(invitation);
  if (!invited.is_object() || !invited.contains("token"))
    throw RunError(
        "rank 0 did not say where it listens, its broadcast, start all ranks with the same program");
  token_ = invited.at("token");
  const Endpoint endpoint = invited.at("endpoint");
  std::string why;
  rank_0_ = connect_to(endpoint, member.options().join, /*insist=*/true, why);
  if (!rank_0_.open())
    throw RunError(
        fmt::format("rank {} cannot reach rank 0 ({}), {} port {}, check that the machines reach each other",
                    member.rank(), why, endpoint.addresses.front(), endpoint.port));
  rank_0_.trust();
  rank_0_.send({{"say", "hello"},
                {"token", token_},
                {"rank", member.rank()},
                {"host", host_name()},
                {"process", getpid()},
                {"endpoint", Endpoint{own_addresses(), listener_.port()}}});
  heard_ = woke_ = next_beat_ = clock_seconds();
}

void Link::run() {
  while (still_here(clock_seconds())) {
    wait(next_beat_);
    speak();
    hear();
    serve_peers();
  }
}

void Link::wait(double until) {
  std::vector<pollfd> descriptors = {{member_.mailbox().descriptor(), POLLIN, 0},
                                     {listener_.socket(), POLLIN, 0}};
  if (rank_0_.open()) descriptors.push_back({rank_0_.socket(), rank_0_.events(), 0});
  for (const Connection& caller : callers_) descriptors.push_back({caller.socket(), caller.events(), 0});
  wait_for(descriptors, until - clock_seconds());
}

void Link::speak() {
  for (const json& message : member_.mailbox().take()) {
    const std::string word = message.at("say");
    if (word == "abandon") abandoned_ = true;
    if (word == "bye") leaving_since_ = clock_seconds();
    rank_0_.send(message);
  }
  rank_0_.send_rest();
  const double now = clock_seconds();
  if (now < next_beat_) return;
  next_beat_ = now + member_.options().beat;
  if (leaving_since_ < 0) rank_0_.send({{"say", "beat"}, {"beat", member_.report()}});
}

void Link::hear() {
  for (const json& message : rank_0_.receive()) {
    heard_ = clock_seconds();
    try {
      hear_word(message);
    } catch (const json::exception&) {
      rank_0_.close();  // another program
    }
  }
}

void Link::hear_word(const json& message) {
  const std::string word = message.at("say");
  if (word == "beat") {
    beat_of_rank_0_ = message.at("beat");
  } else if (word == "end") {
    member_.begin_ending();
    member_.end_process(message.at("status"));
  } else if (word == "refused") {
    refused_ = true;
    member_.set_refused(fmt::format("rank 0 refuses rank {}, {}, start all ranks of a job together",
                                    member_.rank(), message.at("why").get<std::string>()));
  } else {
    if (word == "all here")
      for (const json& rank : message.at("ranks"))
        peers_.push_back(
            {{static_cast<int>(peers_.size()), rank.at("host"), rank.at("process")}, rank.at("endpoint")});
    member_.hear(message);
  }
}

/// False: the thread may end. Does not come back when rank 0 is lost.
bool Link::still_here(double now) {
  const WatchOptions& options = member_.options();
  const double away = now - woke_ - options.beat;  // this process itself was stopped
  if (away > options.silence / 2) heard_ += away;
  woke_ = now;
  if (abandoned_ || refused_) return false;
  if (leaving_since_ >= 0) return rank_0_.open() && now - leaving_since_ < 2 * options.grace;
  const Identity rank_0 = peers_.empty() ? Identity{} : peers_[0].who;
  const std::string where =
      place(std::max(beat_of_rank_0_.step, member_.report().step), beat_of_rank_0_.activity);
  if (!rank_0_.open())
    rank_0_is_lost(ended_without_a_word(peers_.empty() ? "rank 0" : describe(rank_0), where));
  if (now - heard_ >= options.silence) rank_0_is_lost(silent(rank_0, now - heard_, where));
  return true;
}

/// Answers other ranks that ask whether this one is there.
void Link::serve_peers() {
  for (Connection caller = listener_.accept(); caller.open(); caller = listener_.accept())
    callers_.push_back(std::move(caller));
  for (Connection& caller : callers_) {
    for (const json& message : caller.receive()) {
      if (message.at("say") != "are you alive" || message.value("token", json()) != token_) continue;
      caller.send({{"say", "alive"}});
      ++answered_callers_;
    }
  }
  std::erase_if(callers_, [](const Connection& caller) { return !caller.open(); });
}

// ---------------------------------------------------------------------------------------------- without rank
// 0
/// The lowest rank that is left speaks, once.
void Link::rank_0_is_lost(const Verdict& verdict) {
  member_.begin_ending();
  rank_0_.close();
  const int rank = member_.rank();
  const bool speaks = peers_.empty() ? rank == 1 : !a_lower_rank_lives();
  if (!speaks) member_.end_process(verdict.status);
  say_error(verdict.line);
  // The others ask whether somebody speaks: there has to be an answer for a while.
  const double end = clock_seconds() + 2 * member_.options().grace;
  while (answered_callers_ < member_.ranks() - 1 - rank && clock_seconds() < end) {
    wait(end);
    member_.mailbox().take();
    serve_peers();
  }
  member_.end_process(verdict.status);
}

bool Link::a_lower_rank_lives() {
  constexpr int kAtOnce = 16;
  for (int first = 1; first < member_.rank(); first += kAtOnce)
    if (one_lives(first, std::min(first + kAtOnce, member_.rank()))) return true;
  return false;
}

/// Asks ranks [first, last) at the same time, and answers those that ask this one.
bool Link::one_lives(int first, int last) {
  std::vector<std::thread> questions;
  for (int rank = first; rank < last; ++rank)
    questions.emplace_back([this, rank] { ask_whether_alive(peers_[static_cast<size_t>(rank)]); });
  int gone = 0;
  bool alive = false;
  while (gone < last - first && !alive) {
    wait(clock_seconds() + member_.options().grace);
    for (const json& message : member_.mailbox().take()) {
      gone += message.at("say") == "gone" ? 1 : 0;
      alive = alive || message.at("say") == "alive";
    }
    serve_peers();
  }
  for (std::thread& question : questions) question.join();
  return alive;
}

void Link::ask_whether_alive(const Peer& peer) {
  const double end = clock_seconds() + member_.options().grace;
  std::string why;
  Connection connection = connect_to(peer.endpoint, member_.options().grace, /*insist=*/false, why);
  connection.send({{"say", "are you alive"}, {"token", token_}});
  while (connection.open() && clock_seconds() < end) {
    std::vector<pollfd> descriptors = {{connection.socket(), connection.events(), 0}};
    wait_for(descriptors, end - clock_seconds());
    for (const json& message : connection.receive())
      if (message.at("say") == "alive") return member_.say("alive");
  }
  member_.say("gone");
}
