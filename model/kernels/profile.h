// Where the time of a step goes: seconds, arithmetic and memory traffic per phase and operation. Off unless a
// Context points to a Profile; then every door (ON_DEVICE) records its call.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

/// What one call of an operation must do at least: floating-point operations (2 per multiply-add), and bytes
/// read and written when every operand moves once. Zero when nobody counted.
struct Work {
  double flops = 0;
  double bytes = 0;
};

class Profile {
 public:
  struct Row {
    std::string phase;  // "forward"
    std::string op;     // "layernorm_forward"
    int64_t calls = 0;
    double seconds = 0;
    Work work;
  };
  /// Later calls belong to this phase.
  void begin_phase(const std::string& name) { phase_ = name; }
  void add(const char* op, double seconds, const Work& work);
  /// In the order of their first call.
  const std::vector<Row>& rows() const { return rows_; }
  void clear() { rows_.clear(); }

 private:
  std::string phase_;
  std::vector<Row> rows_;
};

/// Times its own life as one call of `op`; does nothing without a profile.
class OpTimer {
 public:
  OpTimer(Profile* profile, const char* op, const Work& work) : profile_(profile), op_(op), work_(work) {
    if (profile_ != nullptr) start_ = Clock::now();
  }
  ~OpTimer() {
    if (profile_ != nullptr)
      profile_->add(op_, std::chrono::duration<double>(Clock::now() - start_).count(), work_);
  }
  OpTimer(const OpTimer&) = delete;
  OpTimer& operator=(const OpTimer&) = delete;

 private:
  using Clock = std::chrono::steady_clock;
  Profile* profile_;
  const char* op_;
  Work work_;
  Clock::time_point start_;
};

/// The work of operations that do not count theirs; each header that does overloads this for its arguments.
template <typename... Arguments>
Work work(const Arguments&...) {
  return {};
}
