// `train_gpt prepare`: text files to token shards.
//
// Documents inside a file are separated by a line that holds only <|endoftext|>; each file is at least one
// document. The stream is, for every document, the end-of-text id, then the document's tokens (as GPT-2 and
// llm.c do it). The line break before and after a separator line belongs to the separator, not to a document.
//
// Validation takes whole documents from the end until it has at least `val_fraction` of the bytes; training
// keeps at least one document. A corpus of one document is split inside it, at a line break where there is
// one near.
//
// DIR receives train_000000.bin, ..., val_000000.bin, ..., tokenizer.json and, last, prepare.json (sources,
// options, counts). A DIR without a complete prepare.json was interrupted and is simply made again.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

struct PrepareOptions {
  std::vector<std::string> texts;  // files, in the order of the stream
  std::string out;                 // DIR; made when missing
  std::string tokenizer = "byte";
  double val_fraction = 0.01;          // in [0, 1)
  int64_t shard_tokens = 100'000'000;  // per file
  int threads = 0;                     // 0: all cores
};

struct PrepareReport {
  int64_t documents = 0;
  int64_t train_tokens = 0, val_tokens = 0;  // end-of-text ids included
  int train_shards = 0, val_shards = 0;
  int64_t bytes = 0;  // of text
  double seconds = 0;
  int64_t vocab_size = 0;
};

/// Called every few MB from one thread: the part of the work that is done in [0, 1], and the speed.
using PrepareProgress = std::function<void(double fraction, double mb_per_second)>;

/// Does it. The result does not depend on `threads`. UsageError for options, RunError for files: a missing or
/// empty text, a DIR that holds shards of somebody else, a full disk.
PrepareReport prepare(const PrepareOptions& options, const PrepareProgress& progress = {});

/// True when DIR holds the complete result of prepare() for these very options and these very files (names,
/// sizes and times of last change), so that there is nothing to do.
bool is_prepared(const PrepareOptions& options);
