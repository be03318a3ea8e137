// What a run says: OUT/log.jsonl for programs, a progress line for people.
#pragma once

#include <chrono>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>

/// OUT/log.jsonl, one JSON object per line, "type" first, each written out at once. DESIGN.md section 4 lists
/// the types.
class RunLog {
 public:
  /// Starts a new log; a file that is there is replaced, so check first (exists()).
  static RunLog create(const std::string& out);
  /// Continues a log after a checkpoint: lines about steps that will be made again are dropped, as is a last
  /// line that a crash cut short.
  static RunLog resume(const std::string& out, int64_t step);
  static bool exists(const std::string& out);
  /// Of ranks that keep no log: takes lines and does nothing.
  static RunLog none() { return {"", -1}; }

  RunLog(RunLog&& other) noexcept;
  ~RunLog();
  /// RunError when the disk is full; earlier lines stay.
  void write(const nlohmann::ordered_json& line);

 private:
  RunLog(std::string path, int file) : path_(std::move(path)), file_(file) {}
  std::string path_;
  int file_;
};

/// What the progress line shows.
struct ProgressState {
  int64_t step = 0;     // updates done
  double loss = 0;      // of the last one
  double val_loss = 0;  // last validation; NaN before the first
  double tokens_per_second = 0;
};

/// One line that is redrawn on a terminal; otherwise a plain line at most every few seconds.
class Progress {
 public:
  /// `first_step` is where a resumed run begins; the time left is estimated from the steps made since.
  /// `shown` is false on ranks that print nothing.
  Progress(int64_t first_step, int64_t total_steps, bool shown = true);
  void update(const ProgressState& state);
  /// Shows any text the same way.
  void show(const std::string& text);
  /// Prints a message on a line of its own.
  void say(const std::string& message);
  void finish();

 private:
  using Clock = std::chrono::steady_clock;
  std::string text(const ProgressState& state) const;
  bool too_soon();
  void draw(const std::string& text);
  int64_t first_step_, total_steps_;
  bool shown_, terminal_;
  bool line_open_ = false;
  Clock::time_point start_, last_;
};

/// "1:05", "2:03:04"
std::string clock_text(double seconds);
/// The most memory this process ever held, in MiB.
double peak_rss_mb();
