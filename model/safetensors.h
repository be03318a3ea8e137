// The safetensors format: a little-endian uint64 (length of the header), the header (JSON: name -> dtype,
// shape, data_offsets; optional "__metadata__" of strings), then the values, row-major, little-endian.
// Source: github.com/huggingface/safetensors, "Format".
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "files.h"
#include "model/kernels/context.h"

/// A tensor under a name, as optimizers and models hand them over.
struct NamedTensor {
  std::string name;
  Tensor value;              // f32, bf16, i32 or f64
  bool transposed = false;   // on disk a matrix (rows, cols) becomes (cols, rows)
  Context* where = nullptr;  // whose memory `value` lies in; null: the host's
  // With several ranks a tensor comes in pieces: `value` is rows [first_row, first_row + rows()) of a tensor
  // with all_rows of them. Rows are entries along the first dimension, before transposing. A piece of another
  // rank has its shape and no data.
  int64_t first_row = 0;
  int64_t all_rows = -1;  // -1: `value` is the whole

  int64_t rows() const { return value.shape.rank() == 0 ? 1 : value.shape[0]; }
  int64_t whole_rows() const { return all_rows < 0 ? rows() : all_rows; }
  /// Of the whole, as the file has it.
  std::vector<int64_t> shape_on_disk() const;
};

/// A file that is read in place. Everything in the header is checked when it is opened: RunError with file
/// and tensor.
class SafetensorsReader {
 public:
  struct Entry {
    std::string name;
    std::string dtype;  // "F32", "F16", "BF16", "I32", ...
    std::vector<int64_t> shape;
    int64_t begin, end;              // bytes in the file
    std::string shape_text() const;  // "(4, 64)"
  };
  explicit SafetensorsReader(const std::string& path);

  const std::string& path() const { return file_.path(); }
  const std::vector<Entry>& entries() const { return entries_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  /// Null when there is no tensor of this name.
  const Entry* find(const std::string& name) const;
  /// Copies the tensor `from`, or the piece of it that `to` is, into `to.value` (transposed when `to` says
  /// so), converting F32, F16 and BF16 to f32 (bf16 only from BF16, i32 only from I32). RunError
  /// names file and tensor when it is missing or has another shape or dtype. A piece without data is looked
  /// for, not read.
  void read(const std::string& from, const NamedTensor& to) const;
  /// As above, for a tensor with more rows in the file: takes the first ones.
  void read_first_rows(const std::string& from, const NamedTensor& to) const;
  /// True when two tensors of the file have the same bytes.
  bool same_values(const Entry& a, const Entry& b) const;

 private:
  void parse(const std::string& header, int64_t data_start);
  void copy(const Entry& entry, const NamedTensor& to) const;
  MappedFile file_;
  std::vector<Entry> entries_;  // in the order of the file
  std::map<std::string, size_t> by_name_;
  std::map<std::string, std::string> metadata_;
};

/// Writes a file atomically; a full disk is a RunError and leaves nothing under `path`. Values are written as
/// they are, bit for bit.
void write_safetensors(const std::string& path, std::span<const NamedTensor> tensors,
                       const std::map<std::string, std::string>& metadata = {{"format", "pt"}},
                       Existing existing = Existing::refuse);

/// The same by all ranks, each writing what it owns, into a file that does not depend on who owns what. Every
/// rank passes the same list but for the data: the pieces of a tensor follow each other in the list and cover
/// it; each has data on one rank, or on all, then rank 0 writes it. Rank 0 makes the file and takes the space
/// for all of it first. What goes wrong on one rank, all throw (together.h); among these, a rank that sees
/// another folder under `path`.
void write_safetensors(const std::string& path, std::span<const NamedTensor> tensors,
                       const std::map<std::string, std::string>& metadata, Existing existing, Comm& comm);
