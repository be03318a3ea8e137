#include "data/loader.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <bit>

#include <fmt/format.h>

#include "error.h"
#include "model/kernels/tensor.h"
#include "random.h"

int64_t permute(int64_t index, int64_t size, uint64_t key) {
  expect(index >= 0 && index < size, "permute: index outside of the domain");
  // Two halves of `bits` each; 4^bits >= size, and < 4 size, so that a walk takes fewer than 4 steps on
  // average.
  const int bits = (std::bit_width(static_cast<uint64_t>(size - 1)) + 1) / 2;
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  auto value = static_cast<uint64_t>(index);
  do {
    uint64_t left = value >> bits, right = value & mask;
    for (uint64_t round = 0; round < 8; ++round) {  // more than four, for the very small domains
      const uint64_t next = left ^ (mix_bits(right ^ mix_bits(key + round)) & mask);
      left = right, right = next;
    }
    value = left << bits | right;
  } while (value >= static_cast<uint64_t>(size));
  return static_cast<int64_t>(value);
}

Loader::Loader(const Shards& shards, LoaderOptions options)
    : shards_(shards), options_(options), chunks_((shards.size() - 1) / std::max<int64_t>(options.T, 1)) {
  expect(options.rows > 0 && options.T > 0, "Loader: rows and T must be positive");
  expect(options.T <= (int64_t{1} << 40) / options.rows, "Loader: rows * T is too large");
  const int64_t need = options.rows * options.T + 1;
  if (shards.size() < need)
    throw RunError(
        fmt::format("the data has {} tokens, {}, one batch of {} rows of {} needs {}: prepare more text or "
                    "choose a smaller batch",
                    shards.size(), shards.pattern(), options.rows, options.T, need));
}

int64_t Loader::chunk_of(int64_t step, int64_t row) const {
  if (!options_.shuffle) return step % batches_per_epoch() * options_.rows + row;
  const int64_t j = step * options_.rows + row;
  const auto epoch = static_cast<uint64_t>(j / chunks_);
  return permute(j % chunks_, chunks_, mix_bits(options_.seed) ^ mix_bits(~epoch));
}

void Loader::fill(int64_t step, int64_t first_row, int64_t rows, int32_t* inputs, int32_t* targets) const {
  expect(step >= 0, "Loader::fill: negative step");
  expect(first_row >= 0 && rows >= 0 && rows <= options_.rows - first_row,
         "Loader::fill: rows outside of the batch");
  if (!options_.shuffle) return fill_chunks(chunk_of(step, first_row), rows, inputs, targets);
  const int64_t T = options_.T;
  for (int64_t r = 0; r < rows; ++r)
    fill_chunks(chunk_of(step, first_row + r), 1, inputs + r * T, targets + r * T);
}

void Loader::fill_chunks(int64_t first, int64_t rows, int32_t* inputs, int32_t* targets) const {
  expect(first >= 0 && rows >= 0 && rows <= chunks_ - first,
         "Loader::fill_chunks: chunks outside of the data");
  const int64_t T = options_.T;
  shards_.copy(first * T, rows * T, inputs);
  shards_.copy(first * T + 1, rows * T, targets);
}

void Loader::read_ahead(int64_t step, int64_t first_row, int64_t rows) const {
  const int64_t T = options_.T;
  if (!options_.shuffle) return shards_.read_ahead(chunk_of(step, first_row) * T, rows * T + 1);
  for (int64_t r = 0; r < rows; ++r) shards_.read_ahead(chunk_of(step, first_row + r) * T, T + 1);
}

BatchReader::BatchReader(const Loader& loader, int64_t first_step, int64_t first_row, int64_t rows)
    : loader_(loader),
      first_row_(first_row),
      rows_(rows),
      step_(first_step),
      wanted_(first_step + 1),  // both buffers are free at first
      done_(first_step) {
  expect(first_step >= 0, "BatchReader: negative step");
  for (Buffer& buffer : buffers_) {
    buffer.inputs.resize(static_cast<size_t>(rows * loader.options().T));
    buffer.targets.resize(buffer.inputs.size());
  }
  // Signals (Ctrl-C) go to the thread that trains: the new thread inherits a mask that blocks them.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this, first_step] { work(first_step); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

BatchReader::~BatchReader() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void BatchReader::work(int64_t first_step) {
  constexpr int64_t kStepsAhead = 4;  // that the system is asked to read from the disk
  for (int64_t step = first_step;; ++step) {
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return stop_ || step <= wanted_; });
      if (stop_) return;
    }
    std::exception_ptr failure;
    try {
      Buffer& buffer = buffers_[step % 2];
      loader_.fill(step, first_row_, rows_, buffer.inputs.data(), buffer.targets.data());
      for (int64_t ahead = 1; ahead <= kStepsAhead; ++ahead)
        loader_.read_ahead(step + ahead, first_row_, rows_);
    } catch (...) {
      failure = std::current_exception();
    }
    {
      const std::lock_guard lock(mutex_);
      if (failure)
        failure_ = failure;
      else
        done_ = step + 1;
    }
    changed_.notify_all();
    if (failure) return;
  }
}

BatchReader::Batch BatchReader::next() {
  std::unique_lock lock(mutex_);
  // The batch before is given back now, and its buffer is the one that step_ + 1 uses.
  wanted_ = step_ + 1;
  changed_.notify_all();
  changed_.wait(lock, [&] { return done_ > step_ || failure_; });
  if (done_ <= step_) std::rethrow_exception(failure_);  // batches before the failure come out first
  const Buffer& buffer = buffers_[step_++ % 2];
  return {buffer.inputs.data(), buffer.targets.data()};
}
