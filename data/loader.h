// Which tokens a step trains on. A *global batch* is `rows` rows of T tokens: batch size x gradient
// accumulation x processes. Row r of step s is a pure function of (data, rows, T, shuffle, seed, s, r);
// micro-batches and processes only take slices [first_row, first_row + n) of it, so that the split never
// changes the data.
//
// In order (default): batch i reads tokens [i * rows * T, (i + 1) * rows * T], one more than it has inputs:
//   targets are the inputs shifted by one. After the last whole batch it starts over at token 0 (the tail
//   that fills no batch is left out): step s reads batch s mod batches_per_epoch().
// Shuffled: the data is cut into N = (size - 1) / T chunks; row j = s * rows + r of the run reads chunk
//   permutation(seed, epoch = j / N)[j mod N]. Every chunk comes once per epoch, and the order is independent
//   of the batch size too. An epoch may end inside a batch.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "data/shards.h"

struct LoaderOptions {
  int64_t rows;  // of the global batch
  int64_t T;     // tokens per row
  bool shuffle = false;
  uint64_t seed = 0;  // of the permutation
};

/// Stateless: fill() may be called for any step, from any thread.
class Loader {
 public:
  /// `shards` must outlive the loader. RunError when the data does not fill one batch (rows * T + 1 tokens).
  Loader(const Shards& shards, LoaderOptions options);

  const LoaderOptions& options() const { return options_; }
  /// Whole batches in one pass over the data, at least 1.
  int64_t batches_per_epoch() const { return chunks_ / options_.rows; }
  /// Chunks of T tokens in the data: the rows that fill_chunks() may read.
  int64_t chunks() const { return chunks_; }
  /// inputs (rows, T) and targets (rows, T) of rows [first_row, first_row + rows) of the global batch of
  /// `step`.
  void fill(int64_t step, int64_t first_row, int64_t rows, int32_t* inputs, int32_t* targets) const;
  /// Chunks [first, first + rows) of the data in file order, without wrapping: to evaluate on all of it.
  void fill_chunks(int64_t first, int64_t rows, int32_t* inputs, int32_t* targets) const;
  /// Asks for the tokens of a step's rows ahead of time; returns at once.
  void read_ahead(int64_t step, int64_t first_row, int64_t rows) const;

 private:
  int64_t chunk_of(int64_t step, int64_t row) const;  // the chunk that this row of this step reads
  const Shards& shards_;
  LoaderOptions options_;
  int64_t chunks_;
};

/// Element `index` of a pseudo-random permutation of 0 .. size - 1 that depends on `key`: a four-round
/// Feistel network over the next even power of two, walked until it lands inside (Black & Rogaway, "Ciphers
/// with Arbitrary Finite Domains", 2002). No tables; O(1) expected.
int64_t permute(int64_t index, int64_t size, uint64_t key);

/// The batches of consecutive steps, prepared by a thread of its own while the previous one trains. Two
/// buffers, allocated once; next() does not touch the disk unless the disk is slower than the training.
class BatchReader {
 public:
  struct Batch {
    const int32_t* inputs;   // (rows, T)
    const int32_t* targets;  // (rows, T)
  };
  /// Reads rows [first_row, first_row + rows) of each global batch, from `first_step` on. `loader` must
  /// outlive it.
  BatchReader(const Loader& loader, int64_t first_step, int64_t first_row, int64_t rows);
  /// The whole global batch.
  BatchReader(const Loader& loader, int64_t first_step)
      : BatchReader(loader, first_step, 0, loader.options().rows) {}
  ~BatchReader();
  BatchReader(const BatchReader&) = delete;

  /// The next step's batch; valid until the following call. Rethrows what the thread met.
  Batch next();
  /// The step that next() will return.
  int64_t step() const { return step_; }

 private:
  struct Buffer {
    std::vector<int32_t> inputs, targets;
    int64_t step = -1;  // the batch in it
  };
  void work(int64_t first_step);
  const Loader& loader_;
  int64_t first_row_, rows_;
  int64_t step_;       // that next() will return
  Buffer buffers_[2];  // step s lives in buffers_[s % 2]
  std::mutex mutex_;
  std::condition_variable changed_;
  int64_t wanted_;  // the thread may fill steps up to this one
  int64_t done_;    // steps below this one are filled
  bool stop_ = false;
  std::exception_ptr failure_;
  std::thread thread_;  // last: starts when the rest is ready
};
