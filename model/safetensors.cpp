#include "model/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "error.h"
#include "json_text.h"

using Json = nlohmann::json;

namespace {

constexpr int64_t kMaxHeaderBytes = 100'000'000;  // the limit of the format's own library

// Bytes of one element, 0 for an unknown dtype. Tensors of dtypes that we do not read may still lie in a
// file.
int64_t element_bytes(const std::string& dtype) {
  static const std::map<std::string, int64_t> kBytes = {
      {"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I64", 8},     {"I32", 4},     {"I16", 2}, {"I8", 1},
      {"U64", 8}, {"U32", 4}, {"U16", 2}, {"U8", 1},   {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"BOOL", 1}};
  const auto it = kBytes.find(dtype);
  return it == kBytes.end() ? 0 : it->second;
}

float from_bf16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// IEEE half precision; exact.
float from_f16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | fraction << 13);  // infinity and NaN
  if (exponent != 0) return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = static_cast<float>(fraction) * 0x1p-24f;  // zero and subnormals
  return sign ? -magnitude : magnitude;
}

std::string text_of(const std::vector<int64_t>& shape) {
  return fmt::format("({})", fmt::join(shape, ", "));
}

[[noreturn]] void fail_file(const std::string& what, const std::string& path) {
  throw RunError(fmt::format("{}, {}, use an undamaged .safetensors file", what, path));
}

[[noreturn]] void fail_tensor(const std::string& name, const std::string& what, const std::string& path) {
  fail_file(fmt::format("tensor {} {}", in_quotes(name), what), path);
}

// One tensor of the header; offsets still relative to the data.
SafetensorsReader::Entry parse_entry(const std::string& name, const Json& json, const std::string& path) {
  if (!json.is_object()) fail_tensor(name, "is not described by an object", path);
  const auto field = [&](const char* key) -> const Json& {
    const auto it = json.find(key);
    if (it == json.end()) fail_tensor(name, fmt::format("has no {}", key), path);
    return *it;
  };
  const auto integers = [&](const char* key) {
    const Json& list = field(key);
    std::vector<int64_t> out;
    bool ok = list.is_array();
    for (size_t i = 0; ok && i < list.size(); ++i) {
      ok = list[i].is_number_unsigned() && list[i].get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX);
      if (ok) out.push_back(list[i].get<int64_t>());
    }
    if (!ok) fail_tensor(name, fmt::format("has {} that is not a list of integers >= 0", key), path);
    return out;
  };
  const Json& dtype = field("dtype");
  if (!dtype.is_string()) fail_tensor(name, "has a dtype that is not a string", path);
  SafetensorsReader::Entry entry{name, dtype.get<std::string>(), integers("shape"), 0, 0};
  const int64_t element = element_bytes(entry.dtype);
  if (element == 0) fail_tensor(name, fmt::format("has the unknown dtype {}", in_quotes(entry.dtype)), path);
  const std::vector<int64_t> offsets = integers("data_offsets");
  if (offsets.size() != 2 || offsets[0] > offsets[1])
    fail_tensor(name, "has data_offsets that are not [begin, end]", path);
  entry.begin = offsets[0], entry.end = offsets[1];
  int64_t bytes = element;
  for (const int64_t dim : entry.shape)
    if (__builtin_mul_overflow(bytes, dim, &bytes))
      fail_tensor(name, "has a shape too large for any file", path);
  if (bytes != entry.end - entry.begin)
    fail_tensor(name,
                fmt::format("of shape {} and dtype {} needs {} bytes, but data_offsets give {}",
                            text_of(entry.shape), entry.dtype, bytes, entry.end - entry.begin),
                path);
  return entry;
}

}  // namespace

std::string SafetensorsReader::Entry::shape_text() const {
  return text_of(shape);
}

SafetensorsReader::SafetensorsReader(const std::string& path) : file_(path, "safetensors file") {
  if (file_.size() < 8)
    fail_file(fmt::format("the file has {} bytes, fewer than a header", file_.size()), path);
  uint64_t length = 0;
  std::memcpy(&length, file_.data(), sizeof length);
  if (length > static_cast<uint64_t>(std::min(kMaxHeaderBytes, file_.size() - 8)))
    fail_file(fmt::format("the header should have {} bytes, but the file has {}", length, file_.size()),
              path);
  parse(std::string(file_.data() + 8, length), 8 + static_cast<int64_t>(length));
}

void SafetensorsReader::parse(const std::string& header, int64_t data_start) {
  const std::string& path = file_.path();
  std::string twice;
  Json json;
  try {
    json = require_json(header, twice);
  } catch (const Json::exception&) {
    fail_file("the header is not valid JSON", path);
  }
  if (!json.is_object()) fail_file("the header is not a JSON object", path);
  if (!twice.empty()) fail_tensor(twice, "is listed twice", path);

  for (const auto& [name, value] : json.items()) {
    if (name != "__metadata__") {
      entries_.push_back(parse_entry(name, value, path));
      continue;
    }
    if (!value.is_object()) fail_file("__metadata__ is not an object", path);
    for (const auto& [key, text] : value.items()) {
      if (!text.is_string()) fail_file(fmt::format("__metadata__ {} is not a string", in_quotes(key)), path);
      metadata_[key] = text.get<std::string>();
    }
  }
  // The values must fill the rest of the file without gaps or overlap: anything else is damage.
  std::sort(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  int64_t end = 0;
  for (Entry& entry : entries_) {
    if (entry.begin < end) fail_tensor(entry.name, "overlaps another one in data_offsets", path);
    if (entry.begin > end) fail_tensor(entry.name, "leaves a gap before it in data_offsets", path);
    end = entry.end;
    if (end > file_.size() - data_start)
      fail_tensor(entry.name,
                  fmt::format("ends at byte {} of the data, but the file is truncated to {}", end,
                              file_.size() - data_start),
                  path);
    entry.begin += data_start, entry.end += data_start;
  }
  if (end != file_.size() - data_start)
    fail_file(fmt::format("{} bytes follow the last tensor", file_.size() - data_start - end), path);
  for (size_t i = 0; i < entries_.size(); ++i) by_name_[entries_[i].name] = i;
}

const SafetensorsReader::Entry* SafetensorsReader::find(const std::string& name) const {
  const auto it = by_name_.find(name);
  return it == by_name_.end() ? nullptr : &entries_[it->second];
}

std::vector<int64_t> NamedTensor::shape_on_disk() const {
  const Shape& shape = value.shape;
  expect(!transposed || shape.rank() == 2, "safetensors: only matrices can be transposed");
  expect(first_row >= 0 && first_row + rows() <= whole_rows() && (shape.rank() > 0 || whole_rows() == 1),
         "safetensors: a piece ends behind its tensor");
  std::vector<int64_t> dims;
  for (int i = 0; i < shape.rank(); ++i) dims.push_back(i == 0 ? whole_rows() : shape[i]);
  if (transposed) std::swap(dims[0], dims[1]);
  return dims;
}

namespace {

const SafetensorsReader::Entry& need(const SafetensorsReader& file, const std::string& name) {
  const auto* entry = file.find(name);
  if (!entry)
    throw RunError(
        fmt::format("tensor {} is missing, {}, use a file of the same model", in_quotes(name), file.path()));
  return *entry;
}

[[noreturn]] void fail_shape(const SafetensorsReader::Entry& entry, const std::string& expected,
                             const std::string& path) {
  throw RunError(fmt::format("tensor {} has shape {}, not {}, {}, use a file of the same model",
                             in_quotes(entry.name), entry.shape_text(), expected, path));
}

// Fills the values of `tensor`, at `to`, from the whole tensor at `from`, which may be unaligned.
template <typename Raw, typename Value, typename Convert>
void convert(const char* from, const NamedTensor& tensor, Value* to, Convert value_of) {
  const auto load = [&](int64_t i) {
    Raw raw;
    std::memcpy(&raw, from + i * static_cast<int64_t>(sizeof raw), sizeof raw);
    return value_of(raw);
  };
  const int64_t size = tensor.value.size();
  if (!tensor.transposed) {
    const int64_t first = tensor.first_row * (size / tensor.rows());
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < size; ++i) to[i] = load(first + i);
    return;
  }
  // On disk (cols, whole_rows). Tiles keep both sides in the cache.
  constexpr int64_t kTile = 64;
  const int64_t rows = tensor.rows(), cols = tensor.value.cols(), line = tensor.whole_rows();
#pragma omp parallel for schedule(static)
  for (int64_t r0 = 0; r0 < rows; r0 += kTile)
    for (int64_t c0 = 0; c0 < cols; c0 += kTile)
      for (int64_t r = r0; r < std::min(rows, r0 + kTile); ++r)
        for (int64_t c = c0; c < std::min(cols, c0 + kTile); ++c)
          to[r * cols + c] = load(c * line + tensor.first_row + r);
}

}  // namespace

void SafetensorsReader::read(const std::string& from, const NamedTensor& to) const {
  const Entry& entry = need(*this, from);
  if (entry.shape != to.shape_on_disk()) fail_shape(entry, text_of(to.shape_on_disk()), path());
  copy(entry, to);
}

void SafetensorsReader::read_first_rows(const std::string& from, const NamedTensor& to) const {
  const Entry& entry = need(*this, from);
  std::vector<int64_t> shape = to.shape_on_disk();
  expect(!to.transposed && !shape.empty(), "safetensors: read_first_rows needs rows that are rows on disk");
  if (entry.shape.size() == shape.size() && entry.shape[0] > shape[0]) shape[0] = entry.shape[0];
  if (entry.shape != shape) fail_shape(entry, text_of(to.shape_on_disk()) + " or more rows", path());
  copy(entry, to);
}

bool SafetensorsReader::same_values(const Entry& a, const Entry& b) const {
  const std::string_view bytes = file_.text();
  return bytes.substr(static_cast<size_t>(a.begin), static_cast<size_t>(a.end - a.begin)) ==
         bytes.substr(static_cast<size_t>(b.begin), static_cast<size_t>(b.end - b.begin));
}

void SafetensorsReader::copy(const Entry& entry, const NamedTensor& to) const {
  const char* from = file_.data() + entry.begin;
  const auto same = [](auto raw) { return raw; };
  const bool f32 = to.value.dtype == DType::f32;
  if (!to.value || to.value.size() == 0) return;
  OnHost host(to.where, to.value, /*load=*/false);
  if (f32 && entry.dtype == "F32")
    convert<float>(from, to, host->f32(), same);
  else if (f32 && entry.dtype == "F16")
    convert<uint16_t>(from, to, host->f32(), from_f16);
  else if (f32 && entry.dtype == "BF16")
    convert<uint16_t>(from, to, host->f32(), from_bf16);
  else if (to.value.dtype == DType::f64 && entry.dtype == "F64")
    convert<double>(from, to, host->f64(), same);
  else if (to.value.dtype == DType::i32 && entry.dtype == "I32")
    convert<int32_t>(from, to, host->i32(), same);
  else if (to.value.dtype == DType::bf16 && entry.dtype == "BF16")
    convert<uint16_t>(from, to, &host->bf16()->bits, same);
  else
    throw RunError(fmt::format("tensor {} has dtype {}, {}, which cannot be read as {}",
                               in_quotes(entry.name), entry.dtype, path(), dtype_name(to.value.dtype)));
  host.store();
}
