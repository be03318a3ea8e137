#include "world/watch_judge.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

namespace {
constexpr size_t kSamples = 10;    // beats that a pace is the mean over
constexpr double kSlow = 1.3;      // times the median
constexpr double kOtherWork = 10;  // times the patience of a step
constexpr double kLongest = 4;     // times the longest that was seen
constexpr size_t kMessage = 500;   // bytes of a message
constexpr size_t kFact = 80;       // bytes of a fact's value in a message
constexpr const char* kContinue = "continue with --resume from the last checkpoint";

std::string cut(std::string text, size_t bytes) {
  if (text.size() <= bytes) return text;
  while (bytes > 0 && (static_cast<unsigned char>(text[bytes]) & 0xc0) == 0x80)
    --bytes;  // inside a UTF-8 letter
  return text.substr(0, bytes) + "...";
}

const std::string* find(const Watch::Facts& facts, const std::string& name) {
  for (const auto& [key, value] : facts)
    if (key == name) return &value;
  return nullptr;
}

std::string value_of(const Watch::Facts& facts, const std::string& name) {
  const std::string* value = find(facts, name);
  if (value == nullptr) return "none";
  return value->empty() ? "nothing" : cut(*value, kFact);
}

/// The name of the first fact in which b differs from a; empty: none.
std::string first_difference(const Watch::Facts& a, const Watch::Facts& b) {
  for (const auto& [name, value] : a) {
    const std::string* other = find(b, name);
    if (other == nullptr || *other != value) return name;
  }
  for (const auto& [name, value] : b)
    if (find(a, name) == nullptr) return name;
  return "";
}
}  // namespace

void to_json(nlohmann::json& json, const Beat& beat) {
  json = {{"step", beat.step},    {"activity", beat.activity}, {"waiting", beat.waiting},
          {"quiet", beat.quiet},  {"longest", beat.longest},   {"work", beat.work},
          {"worked", beat.worked}};
}

void from_json(const nlohmann::json& json, Beat& beat) {
  json.at("step").get_to(beat.step);
  json.at("activity").get_to(beat.activity);
  json.at("waiting").get_to(beat.waiting);
  json.at("quiet").get_to(beat.quiet);
  json.at("longest").get_to(beat.longest);
  json.at("work").get_to(beat.work);
  json.at("worked").get_to(beat.worked);
}

std::string describe(const Identity& who) {
  return fmt::format("rank {} ({}, process {})", who.rank, who.host, who.process);
}

std::string rank_names(const std::vector<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size();) {
    size_t end = i + 1;
    while (end < ranks.size() && ranks[end] == ranks[end - 1] + 1) ++end;
    text += i > 0 ? ", " : "";
    text += end - i > 1 ? fmt::format("{}-{}", ranks[i], ranks[end - 1]) : fmt::format("{}", ranks[i]);
    i = end;
  }
  return text;
}

std::string place(int64_t step, const std::string& activity) {
  const std::string in = step < 0 ? "before the first step" : fmt::format("in step {}", step);
  return activity.empty() ? in : in + ", " + activity;
}

std::string one_line(std::string text) {
  while (!text.empty() && text.back() == '\n') text.pop_back();
  std::replace_if(
      text.begin(), text.end(), [](char c) { return c == '\n' || c == '\r'; }, ' ');
  return cut(std::move(text), kMessage);
}

Verdict ended_without_a_word(const std::string& who, const std::string& where) {
  return {fmt::format("{} ended without a word, {}, {}", who, where, kContinue), 1};
}

Verdict silent(const Identity& who, double seconds, const std::string& where) {
  return {fmt::format(
              "{} has been silent for {:.3g} s, {}, look whether the process was stopped or the machine is "
              "gone; {}",
              describe(who), seconds, where, kContinue),
          1};
}

Judge::Judge(int ranks, const WatchOptions& options, double now)
    : options_(options), start_(now), states_(static_cast<size_t>(ranks)) {
  for (int rank = 0; rank < ranks; ++rank) of(rank).who.rank = rank;
}

/// The first verdict counts: what follows it are consequences.
void Judge::decide(Verdict verdict) {
  if (verdict_) return;
  verdict_ = std::move(verdict);
}

void Judge::joined(const Identity& who, double now) {
  State& state = of(who.rank);
  state.who = who;
  state.joined = true;
  state.heard = now;
}

bool Judge::all_joined() const {
  return std::all_of(states_.begin(), states_.end(), [](const State& state) { return state.joined; });
}

void Judge::beat(int rank, const Beat& beat, double now) {
  State& state = of(rank);
  state.heard = now;
  state.beat = beat;
  if (state.samples.empty() || beat.worked > state.samples.back().worked)
    state.samples.push_back({beat.work, beat.worked});
  if (state.samples.size() > kSamples) state.samples.pop_front();
}

/// How far the job is, as far as is known: a rank that is lost has been near.
int64_t Judge::step() const {
  int64_t step = of(0).beat.step;
  for (const State& state : states_) step = std::max(step, state.beat.step);
  return step;
}

void Judge::lost(const std::vector<int>& ranks, double now) {
  std::vector<int> missing;
  for (const int rank : ranks)
    if (of(rank).joined && !of(rank).left) missing.push_back(rank);
  if (missing.empty()) return;
  if (now < away_until_) return decide({"", 1});  // they had given this process up, and said so
  const State& first = of(missing.front());
  decide(ended_without_a_word(missing.size() == 1 ? describe(first.who) : rank_names(missing),
                              place(step(), first.beat.activity)));
}

void Judge::failed(int rank, const std::string& message, int status, double now) {
  of(rank).failure = Failure{one_line(message), status};
  if (!first_failure_) {
    first_failure_ = rank;
    failing_since_ = now;
  }
  const bool all = std::all_of(states_.begin(), states_.end(),
                               [](const State& state) { return state.failure.has_value() || state.left; });
  if (all) judge_failures();
}

/// The first message, and who else has the same.
void Judge::judge_failures() {
  const Failure& first = *of(*first_failure_).failure;
  std::vector<int> same;
  for (const State& state : states_)
    if (state.failure && state.failure->message == first.message) same.push_back(state.who.rank);
  if (same.size() == states_.size())
    decide({first.message, first.status});
  else
    decide({fmt::format("{}: {}", rank_names(same), first.message), first.status});
}

void Judge::tick(double now) {
  if (first_failure_ && now - failing_since_ >= options_.grace) judge_failures();
  if (!all_joined()) {
    if (now - start_ >= options_.join) judge_late();
    return;  // nobody steps yet
  }
  judge_silence(now);
  judge_hangs();
  judge_deadlock();
}

void Judge::judge_late() {
  std::vector<int> late;
  for (const State& state : states_)
    if (!state.joined) late.push_back(state.who.rank);
  decide({fmt::format("{} of {} did not come within {:.3g} s, look whether they were started and reach {}",
                      rank_names(late), states_.size(), options_.join, of(0).who.host),
          1});
}

void Judge::judge_silence(double now) {
  for (const State& state : states_)
    if (!state.left && now - state.heard >= options_.silence)
      return decide(silent(state.who, now - state.heard, place(step(), state.beat.activity)));
}

/// Seconds that a rank may take to get on.
double Judge::allowance(const State& state) const {
  if (!state.beat.activity.empty() || state.beat.longest == 0) return kOtherWork * options_.patience;
  return std::max(options_.patience, kLongest * state.beat.longest);
}

/// The rank that has been at it for the longest, of those that do not wait for others. When that is all of
/// them, all are blocked where nobody can tell a rank that waits from one that hangs.
void Judge::judge_hangs() {
  const State* worst = nullptr;
  bool all = true;
  for (const State& state : states_) {
    if (state.left) continue;
    const double over = state.beat.quiet - allowance(state);
    all = all && !state.beat.waiting && over >= -2 * options_.beat;  // reports are a bit apart
    if (state.beat.waiting || over < 0) continue;
    if (worst == nullptr || state.beat.quiet > worst->beat.quiet) worst = &state;
  }
  if (worst == nullptr) return;
  if (all && present().size() > 1) return nobody_gets_on();
  decide({fmt::format("{} has not got on for {:.3g} s, {}, {}; a larger --patience waits longer",
                      describe(worst->who), worst->beat.quiet, place(worst->beat.step, worst->beat.activity),
                      kContinue),
          1});
}

void Judge::judge_deadlock() {
  for (const State* state : present())
    if (!state->beat.waiting || state->failure || state->beat.quiet < allowance(*state)) return;
  if (!present().empty()) nobody_gets_on();
}

/// Then nobody can be named, but where each of them is helps.
void Judge::nobody_gets_on() {
  std::map<std::string, std::vector<int>> places;
  double quiet = std::numeric_limits<double>::infinity();
  for (const State* state : present()) {
    quiet = std::min(quiet, state->beat.quiet);
    places[place(state->beat.step, state->beat.activity)].push_back(state->who.rank);
  }
  std::string where;
  for (const auto& [at, ranks] : places)
    where += fmt::format("{}{} {}", where.empty() ? "" : "; ", rank_names(ranks), at);
  decide({fmt::format("no rank has got on for {:.3g} s, {}, {}; a larger --patience waits longer", quiet,
                      where, kContinue),
          1});
}

/// The ranks that have not said goodbye.
std::vector<const Judge::State*> Judge::present() const {
  std::vector<const State*> present;
  for (const State& state : states_)
    if (!state.left) present.push_back(&state);
  return present;
}

bool Judge::answered(int rank, Answer answer) {
  of(rank).answer = std::move(answer);
  return judge_answers();
}

bool Judge::judge_answers() {
  const std::vector<const State*> ranks = present();
  if (std::any_of(ranks.begin(), ranks.end(), [](const State* state) { return !state->answer; }))
    return false;
  const State& first = *ranks.front();
  for (const State* state : ranks)
    if (state->answer->step != first.answer->step)
      decide({fmt::format("rank {} compares after step {} and rank {} after step {}, {}", state->who.rank,
                          state->answer->step, first.who.rank, first.answer->step, kContinue),
              1});
  if (first.answer->step < 0)
    facts_differ(ranks);
  else
    checksums_differ(ranks);
  for (State& state : states_) state.answer.reset();
  return !verdict_;
}

void Judge::facts_differ(const std::vector<const State*>& ranks) {
  const Watch::Facts& facts = ranks.front()->answer->facts;
  std::string name;
  for (size_t i = 1; i < ranks.size() && name.empty(); ++i)
    name = first_difference(facts, ranks[i]->answer->facts);
  if (name.empty()) return;
  const std::string here = value_of(facts, name);
  std::string there;
  std::vector<int> others;  // that have the same other value
  for (const State* state : ranks) {
    const std::string value = value_of(state->answer->facts, name);
    if (first_difference(facts, state->answer->facts) != name || (!there.empty() && value != there)) continue;
    there = value;
    others.push_back(state->who.rank);
  }
  decide(
      {fmt::format("{} {} {} {} and rank {} has {}, start all ranks with the same options, files and program",
                   rank_names(others), others.size() == 1 ? "has" : "have", name, there,
                   ranks.front()->who.rank, here),
       1});
}

/// Who differs from most is to blame; without a majority nobody is.
void Judge::checksums_differ(const std::vector<const State*>& ranks) {
  std::map<std::string, std::vector<int>> holders;
  for (const State* state : ranks) holders[state->answer->facts.at(0).second].push_back(state->who.rank);
  if (holders.size() == 1) return;
  const auto most = std::max_element(holders.begin(), holders.end(), [](const auto& a, const auto& b) {
    return a.second.size() < b.second.size();
  });
  std::vector<int> all, few;
  for (const State* state : ranks) {
    all.push_back(state->who.rank);
    if (state->answer->facts.at(0).second != most->first) few.push_back(state->who.rank);
  }
  const bool majority = 2 * most->second.size() > all.size();
  decide(
      {fmt::format(
           "the parameters of {} differ{} after step {}, {}; if it happens again, look for a faulty machine",
           rank_names(majority ? few : all), majority ? " from those of the other ranks" : "",
           ranks.front()->answer->step, kContinue),
       1});
}

void Judge::was_stopped(double seconds, double now) {
  for (State& state : states_) state.heard += seconds;
  start_ += seconds;
  failing_since_ += seconds;
  // They look at the clock once per beat; what they did about it is found in the first moment.
  if (seconds + 2 * options_.beat >= options_.silence) away_until_ = now + 2 * options_.beat;
}

std::vector<RankPace> Judge::paces() const {
  std::vector<RankPace> paces;
  for (const State& state : states_) {
    double seconds = 0;
    if (!state.samples.empty()) {
      const Sample last = state.samples.back();
      const Sample first = state.samples.size() > 1 ? state.samples.front() : Sample{0, 0};
      if (last.worked > first.worked)
        seconds = (last.work - first.work) / static_cast<double>(last.worked - first.worked);
    }
    paces.push_back({state.who.rank, state.who.host, state.beat.step, seconds});
  }
  return paces;
}

std::string slowest(const std::vector<RankPace>& paces) {
  std::vector<double> seconds;
  for (const RankPace& pace : paces) seconds.push_back(pace.seconds);
  if (seconds.empty()) return "";
  std::sort(seconds.begin(), seconds.end());
  const double median = seconds[(seconds.size() - 1) / 2];  // of two, the faster
  const auto slow = std::max_element(
      paces.begin(), paces.end(), [](const RankPace& a, const RankPace& b) { return a.seconds < b.seconds; });
  if (median <= 0 || slow->seconds <= kSlow * median) return "";
  return fmt::format("rank {} ({}): {:.3g} s of own work per step, the median is {:.3g} s", slow->rank,
                     slow->host, slow->seconds, median);
}
