// The writing half of safetensors.h: where every piece lies in the file, and ranks that write theirs.
#include <algorithm>
#include <functional>
#include <memory>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "json_text.h"
#include "model/kernels/together.h"
#include "model/safetensors.h"
#include "random.h"

namespace {

const char* dtype_on_disk(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "F32";
    case DType::bf16:
      return "BF16";
    case DType::f64:
      return "F64";
    case DType::i32:
      return "I32";
  }
  throw std::logic_error("safetensors: unknown dtype");
}

/// Where everything goes.
struct Layout {
  std::string start;           // the length of the header and the header
  std::vector<int64_t> begin;  // of each piece's tensor, bytes in the file
  int64_t bytes = 0;           // of the file
};

// True when `piece` goes on at `row` of the tensor that `first` began.
bool continues(const NamedTensor& first, const NamedTensor& piece, int64_t row) {
  return piece.first_row == row && piece.value.dtype == first.value.dtype &&
         piece.transposed == first.transposed && piece.shape_on_disk() == first.shape_on_disk();
}

Layout lay_out(std::span<const NamedTensor> tensors, const std::map<std::string, std::string>& metadata) {
  Layout layout;
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  if (!metadata.empty()) json["__metadata__"] = metadata;
  int64_t end = 0;
  for (size_t i = 0; i < tensors.size();) {
    const NamedTensor& first = tensors[i];
    expect(!json.contains(first.name), "write_safetensors: a name is used twice");
    const int64_t begin = end;
    int64_t row = 0;
    for (; i < tensors.size() && tensors[i].name == first.name; ++i) {
      const bool fits = continues(first, tensors[i], row);
      expect(fits, "write_safetensors: pieces of a tensor must follow each other and be alike");
      row += tensors[i].rows(), end += tensors[i].value.bytes();
      layout.begin.push_back(begin);
    }
    expect(row == first.whole_rows(), "write_safetensors: rows of a tensor are in no piece");
    json[first.name] = {{"dtype", dtype_on_disk(first.value.dtype)},
                        {"shape", first.shape_on_disk()},
                        {"data_offsets", {begin, end}}};
  }
  std::string header = json_text(json);
  header.append((8 - header.size() % 8) % 8, ' ');  // so that the values start at a multiple of 8
  const uint64_t length = header.size();
  layout.start.assign(reinterpret_cast<const char*>(&length), sizeof length);
  layout.start += header;
  const auto values = static_cast<int64_t>(layout.start.size());
  for (int64_t& begin : layout.begin) begin += values;
  layout.bytes = values + end;
  return layout;
}

/// Writes bytes at an offset of the file.
using Put = std::function<void(int64_t offset, const void* bytes, int64_t count)>;

// The transpose of a piece, a few MB at a time. Lines of the file are columns of the tensor; the piece is
// line[first_row], ..., of each.
template <typename Raw>
void put_transposed(const Put& put, int64_t begin, const NamedTensor& piece, const void* values) {
  const auto* from = static_cast<const Raw*>(values);
  const int64_t rows = piece.rows(), cols = piece.value.cols(), line = piece.whole_rows();
  const int64_t lines = std::clamp<int64_t>((1 << 20) / std::max<int64_t>(rows, 1), 1, cols);
  std::vector<Raw> buffer(static_cast<size_t>(lines * rows));
  constexpr auto kBytes = static_cast<int64_t>(sizeof(Raw));
  for (int64_t c0 = 0; c0 < cols; c0 += lines) {
    const int64_t n = std::min(lines, cols - c0);
    constexpr int64_t kTile = 64;
#pragma omp parallel for schedule(static)
    for (int64_t r0 = 0; r0 < rows; r0 += kTile)
      for (int64_t c = 0; c < n; ++c)
        for (int64_t r = r0; r < std::min(rows, r0 + kTile); ++r)
          buffer[static_cast<size_t>(c * rows + r)] = from[r * cols + c0 + c];
    const int64_t first = begin + kBytes * (c0 * line + piece.first_row);
    if (rows == line)
      put(first, buffer.data(), kBytes * n * rows);
    else
      for (int64_t c = 0; c < n; ++c) put(first + kBytes * c * line, &buffer[c * rows], kBytes * rows);
  }
}

// `begin`: of the whole tensor.
void put_piece(const Put& put, int64_t begin, const NamedTensor& piece) {
  const OnHost host(piece.where, piece.value);
  const int64_t bytes = piece.value.bytes();
  if (!piece.transposed)
    put(begin + piece.first_row * (bytes / piece.rows()), host->data, bytes);
  else if (dtype_bytes(piece.value.dtype) == 2)
    put_transposed<uint16_t>(put, begin, piece, host->data);
  else if (dtype_bytes(piece.value.dtype) == 4)
    put_transposed<uint32_t>(put, begin, piece, host->data);
  else
    put_transposed<uint64_t>(put, begin, piece, host->data);
}

// `piece` and `next` as one, when they are neighbours in the tensor and in memory: matrices that are stacked
// on disk side by side then go there in one go.
bool join(NamedTensor& piece, const NamedTensor& next) {
  const auto* end = static_cast<const char*>(piece.value.data) + piece.value.bytes();
  if (next.name != piece.name || next.first_row != piece.first_row + piece.rows() || next.value.data != end ||
      next.where != piece.where || piece.value.shape.rank() != 2)
    return false;
  piece.value.shape = {piece.rows() + next.rows(), piece.value.cols()};
  return true;
}

// Which of the pieces this rank writes. Every rank comes to the same conclusion about all of them.
std::vector<bool> share(std::span<const NamedTensor> tensors, Comm& comm) {
  std::vector<double> owners;
  for (const NamedTensor& piece : tensors) owners.push_back(piece.value ? 1 : 0);
  if (!owners.empty()) comm.sum(owners);
  std::vector<bool> mine;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const NamedTensor& piece = tensors[i];
    if (piece.value.size() > 0 && owners[i] != 1 && owners[i] != comm.size())
      throw std::logic_error(fmt::format("write_safetensors: rows {} to {} of {} are on {} ranks of {}",
                                         piece.first_row, piece.first_row + piece.rows(), piece.name,
                                         owners[i], comm.size()));
    mine.push_back(piece.value && piece.value.size() > 0 && (owners[i] == 1 || comm.rank() == 0));
  }
  return mine;
}

void put_share(const Put& put, std::span<const NamedTensor> tensors, const std::vector<bool>& mine,
               const std::vector<int64_t>& begin) {
  for (size_t i = 0; i < tensors.size();) {
    NamedTensor piece = tensors[i];
    const size_t first = i;
    for (++i; mine[first] && i < tensors.size() && mine[i] && join(piece, tensors[i]);) ++i;
    if (mine[first]) put_piece(put, begin[first], piece);
  }
}

// What all ranks must have alike before any writes: eight bytes from the lists but for the data.
std::string fingerprint(const Layout& layout, std::span<const NamedTensor> tensors) {
  uint64_t hash = hash_name(layout.start);
  for (const NamedTensor& piece : tensors) hash = mix_bits(hash ^ static_cast<uint64_t>(piece.rows()));
  return {reinterpret_cast<const char*>(&hash), sizeof hash};
}

}  // namespace

void write_safetensors(const std::string& path, std::span<const NamedTensor> tensors,
                       const std::map<std::string, std::string>& metadata, Existing existing) {
  Comm alone;
  write_safetensors(path, tensors, metadata, existing, alone);
}

void write_safetensors(const std::string& path, std::span<const NamedTensor> tensors,
                       const std::map<std::string, std::string>& metadata, Existing existing, Comm& comm) {
  Layout layout;
  together(comm, [&] { layout = lay_out(tensors, metadata); });
  const std::string print = fingerprint(layout, tensors);
  const std::string roots = broadcast_text(comm, print + new_mark());
  const std::string mark = roots.substr(print.size());
  std::unique_ptr<FileWriter> whole;  // rank 0's
  together(comm, [&] {
    if (!roots.starts_with(print))
      throw RunError("the tensors are not those of rank 0, " + path + ", start all ranks with equal options");
    if (comm.rank() != 0) return;
    whole = std::make_unique<FileWriter>(path, existing);
    whole->reserve(layout.bytes);
    whole->rewrite(0, layout.start.data(), static_cast<int64_t>(layout.start.size()));
    // In the place of the length, until all is there.
    whole->rewrite(0, mark.data(), static_cast<int64_t>(mark.size()));
    if (!comm.alone()) whole->sync();
  });
  const std::vector<bool> mine = share(tensors, comm);
  together(comm, [&] {
    std::unique_ptr<FileShare> part;
    if (!whole) part = std::make_unique<FileShare>(path, mark);
    const Put put = [&](int64_t offset, const void* bytes, int64_t count) {
      whole ? whole->rewrite(offset, bytes, count) : part->rewrite(offset, bytes, count);
    };
    put_share(put, tensors, mine, layout.begin);
    if (part) part->finish();
  });
  together(comm, [&] {
    if (!whole) return;
    whole->rewrite(0, layout.start.data(), static_cast<int64_t>(mark.size()));
    whole->commit();
  });
}
