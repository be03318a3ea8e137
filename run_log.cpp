#include "run_log.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

#include "error.h"
#include "json_text.h"

namespace {
std::string log_path(const std::string& out) {
  return out + "/log.jsonl";
}

int open_log(const std::string& path, int flags) {
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | flags, 0644);
  if (file < 0)
    throw RunError(fmt::format("cannot write the log: {}, {}, check the folder", std::strerror(errno), path));
  return file;
}

/// A line about work that the resumed run will do again, or that ends the run.
bool is_superseded(const nlohmann::ordered_json& line, int64_t step) {
  const std::string type = line.value("type", "");
  if (type == "run") return false;
  if (type == "end") return true;
  const int64_t at = line.value("step", int64_t{0});
  // `train` and `norms` at step k belong to update k; everything else at step k follows update k - 1.
  return type == "train" || type == "norms" ? at >= step : at > step;
}
}  // namespace

bool RunLog::exists(const std::string& out) {
  return std::filesystem::exists(log_path(out));
}

RunLog RunLog::create(const std::string& out) {
  const std::string path = log_path(out);
  return {path, open_log(path, O_TRUNC)};
}

RunLog RunLog::resume(const std::string& out, int64_t step) {
  const std::string path = log_path(out), temporary = path + ".tmp";
  {
    RunLog kept(temporary, open_log(temporary, O_TRUNC));
    std::ifstream old(path);
    for (std::string text; std::getline(old, text);) {
      const auto line = parse_ordered_json(text);
      if (line.is_object() && !is_superseded(line, step)) kept.write(line);
    }
  }
  std::filesystem::rename(temporary, path);
  return {path, open_log(path, O_APPEND)};
}

RunLog::RunLog(RunLog&& other) noexcept
    : path_(std::move(other.path_)), file_(std::exchange(other.file_, -1)) {}

RunLog::~RunLog() {
  if (file_ >= 0) close(file_);
}

void RunLog::write(const nlohmann::ordered_json& line) {
  if (file_ < 0) return;
  const std::string text = json_text(line) + "\n";
  for (size_t done = 0; done < text.size();) {
    const ssize_t written = ::write(file_, text.data() + done, text.size() - done);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0)
      throw RunError(fmt::format("cannot write the log: {}, {}, free some space and use --resume",
                                 std::strerror(errno), path_));
    done += static_cast<size_t>(written);
  }
}

Progress::Progress(int64_t first_step, int64_t total_steps, bool shown)
    : first_step_(first_step),
      total_steps_(total_steps),
      shown_(shown),
      terminal_(isatty(STDOUT_FILENO) == 1),
      start_(Clock::now()),
      last_(start_) {}

std::string Progress::text(const ProgressState& state) const {
  const double elapsed = std::chrono::duration<double>(Clock::now() - start_).count();
  const int64_t made = state.step - first_step_;
  const double left =
      made > 0 ? elapsed / static_cast<double>(made) * static_cast<double>(total_steps_ - state.step) : 0;
  const std::string val = std::isnan(state.val_loss) ? "-" : fmt::format("{:.4f}", state.val_loss);
  return fmt::format("step {}/{}  loss {:.4f}  val {}  {:.0f} tok/s  {} left", state.step, total_steps_,
                     state.loss, val, state.tokens_per_second, clock_text(left));
}

bool Progress::too_soon() {
  if (!shown_) return true;
  const auto now = Clock::now();
  const double pause = terminal_ ? 0.1 : 5.0;  // seconds between two lines
  if (std::chrono::duration<double>(now - last_).count() < pause) return true;
  last_ = now;
  return false;
}

void Progress::draw(const std::string& text) {
  if (!shown_) return;
  fmt::print("{}{}{}", terminal_ ? "\r\033[K" : "", text, terminal_ ? "" : "\n");
  line_open_ = terminal_;
  std::fflush(stdout);
}

void Progress::update(const ProgressState& state) {
  if (!too_soon() || state.step == total_steps_) draw(text(state));
}

void Progress::show(const std::string& text) {
  if (!too_soon()) draw(text);
}

void Progress::say(const std::string& message) {
  if (!shown_) return;
  finish();
  fmt::print("{}\n", message);
  std::fflush(stdout);
}

void Progress::finish() {
  if (std::exchange(line_open_, false)) fmt::print("\n");
}

std::string clock_text(double seconds) {
  const auto whole = static_cast<int64_t>(std::llround(seconds));
  if (whole >= 3600) return fmt::format("{}:{:02}:{:02}", whole / 3600, whole / 60 % 60, whole % 60);
  return fmt::format("{}:{:02}", whole / 60, whole % 60);
}

double peak_rss_mb() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) / 1024.0;  // Linux counts in KiB
}
