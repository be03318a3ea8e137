#include "data/prepare.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string_view>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "data/documents.h"
#include "data/shards.h"
#include "data/tokenizer.h"
#include "error.h"
#include "files.h"
#include "json_text.h"
#include "model/kernels/tensor.h"

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

namespace {

constexpr const char* kManifest = "prepare.json";
constexpr const char* kType = "anthology-shards";  // of the manifest
constexpr const char* kStaging = "prepare.tmp";    // folder inside DIR in which the new files are made
constexpr size_t kPieceBytes = 1 << 20;            // of text that one thread encodes at a time
constexpr size_t kBatchBytes = 32 << 20;           // of text between two writes; bounds the memory

// ---- Encoding and writing

/// Writes a stream of tokens into FOLDER/PREFIX_000000.bin, ..., each of at most `limit` tokens.
class ShardSeries {
 public:
  ShardSeries(std::string folder, std::string prefix, int64_t limit)
      : folder_(std::move(folder)), prefix_(std::move(prefix)), limit_(limit) {}

  void write(std::span<const uint16_t> ids) {
    while (!ids.empty()) {
      if (!writer_) {
        names_.push_back(fmt::format("{}_{:06}.bin", prefix_, names_.size()));
        writer_ = std::make_unique<ShardWriter>(folder_ + "/" + names_.back(), Existing::replace);
      }
      const auto n = std::min(ids.size(), static_cast<size_t>(limit_ - writer_->size()));
      writer_->write(ids.first(n));
      tokens_ += static_cast<int64_t>(n);
      ids = ids.subspan(n);
      if (writer_->size() == limit_) finish();
    }
  }
  void finish() {
    if (writer_) writer_->finish();
    writer_.reset();
  }
  const std::vector<std::string>& names() const { return names_; }
  int64_t tokens() const { return tokens_; }

 private:
  std::string folder_, prefix_;
  int64_t limit_;
  std::vector<std::string> names_;
  std::unique_ptr<ShardWriter> writer_;
  int64_t tokens_ = 0;
};

/// Work for one thread: about kPieceBytes of text, and its tokens.
struct Job {
  std::vector<DocumentPiece> pieces;
  size_t bytes = 0;
  std::vector<uint16_t> ids;
};

/// Cuts documents into jobs, one batch at a time.
class Cutter {
 public:
  Cutter(const std::vector<DocumentPiece>& documents, const Tokenizer& tokenizer)
      : documents_(documents), tokenizer_(tokenizer) {}

  // Fills `jobs` with up to kBatchBytes of text; returns the number of jobs, 0 at the end.
  size_t next_batch(std::vector<Job>& jobs) {
    size_t bytes = 0, count = 0;
    while (bytes < kBatchBytes && next_ < documents_.size()) {
      if (count == jobs.size()) jobs.emplace_back();
      Job& job = jobs[count++];
      job.pieces.clear();
      job.bytes = 0;
      while (job.bytes < kPieceBytes && next_ < documents_.size()) add_piece(job);
      bytes += job.bytes;
    }
    return count;
  }

 private:
  void add_piece(Job& job) {
    const DocumentPiece& document = documents_[next_];
    const std::string_view rest = document.text.substr(offset_);
    size_t size = rest.size();
    if (size > 2 * kPieceBytes) {
      size = tokenizer_.cut(rest, kPieceBytes);
      if (size == 0) size = rest.size();  // cannot be cut
    }
    job.pieces.push_back({rest.substr(0, size), document.file, offset_ == 0});
    job.bytes += size;
    offset_ += size;
    if (offset_ == document.text.size()) ++next_, offset_ = 0;
  }
  const std::vector<DocumentPiece>& documents_;
  const Tokenizer& tokenizer_;
  size_t next_ = 0, offset_ = 0;  // document, and byte in it
};

void encode(Job& job, const Tokenizer& tokenizer) {
  job.ids.clear();
  for (const DocumentPiece& piece : job.pieces) {
    if (piece.starts_document) job.ids.push_back(static_cast<uint16_t>(tokenizer.end_of_text()));
    tokenizer.encode(piece.text, job.ids);
    // The text was read once and is not needed again: keep it from filling the memory.
    const int64_t start = piece.text.data() - piece.file->data();
    if (piece.text.size() >= kPieceBytes / 2)
      piece.file->forget(start, static_cast<int64_t>(piece.text.size()));
  }
}

/// Progress over all documents, and the time.
class Meter {
 public:
  Meter(int64_t total, const PrepareProgress& progress) : total_(total), progress_(progress) {}
  void add(size_t bytes) {
    done_ += static_cast<int64_t>(bytes);
    if (progress_)
      progress_(static_cast<double>(done_) / static_cast<double>(total_),
                1e-6 * static_cast<double>(done_) / seconds());
  }
  double seconds() const {
    return std::max(1e-9, std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count());
  }

 private:
  int64_t total_, done_ = 0;
  const PrepareProgress& progress_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// Encodes in parallel, writes in order. Where the documents are cut does not depend on the number of threads.
void write_documents(const std::vector<DocumentPiece>& documents, const Tokenizer& tokenizer, int threads,
                     ShardSeries& series, Meter& meter) {
  Cutter cutter(documents, tokenizer);
  std::vector<Job> jobs;
  while (const size_t count = cutter.next_batch(jobs)) {
    std::exception_ptr failure;  // an exception must not leave the parallel region
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (size_t i = 0; i < count; ++i) {
      try {
        encode(jobs[i], tokenizer);
      } catch (...) {
#pragma omp critical
        failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
    size_t bytes = 0;
    for (size_t i = 0; i < count; ++i) {
      series.write(jobs[i].ids);
      bytes += jobs[i].bytes;
    }
    meter.add(bytes);
  }
  series.finish();
}

// ---- The folder

// "train_000012.bin", "val_000000.bin"
bool is_shard_name(std::string_view name) {
  for (const std::string_view prefix : {"train_", "val_"}) {
    if (!name.starts_with(prefix) || !name.ends_with(".bin") || name.size() < prefix.size() + 10) continue;
    name = name.substr(prefix.size(), name.size() - prefix.size() - 4);
    return name.find_first_not_of("0123456789") == std::string_view::npos;
  }
  return false;
}

// prepare.json of the folder; null when there is none.
Json read_manifest(const std::string& folder) {
  const std::string path = folder + "/" + kManifest;
  if (!fs::exists(path)) return nullptr;
  Json manifest = parse_ordered_json(read_text(path, "manifest"));
  if (!manifest.is_object() || manifest.value("type", Json()) != kType ||
      !manifest.value("complete", Json()).is_boolean())
    throw RunError(
        fmt::format("the manifest is not one of 'train_gpt prepare', {}, choose another --out", path));
  return manifest;
}

std::vector<std::string> listed_files(const Json& manifest) {
  std::vector<std::string> names;
  const auto files = manifest.find("files");
  if (files == manifest.end() || !files->is_array()) return names;
  for (const Json& file : *files)
    if (file.is_object() && file.value("name", Json()).is_string()) names.push_back(file["name"]);
  return names;
}

// The shards in the folder, all made by prepare; RunError when one was not. An incomplete manifest was
// written when the folder held nothing foreign, so everything is ours then.
std::vector<std::string> own_shards(const std::string& folder, const Json& manifest) {
  const std::vector<std::string> listed = listed_files(manifest);
  const bool interrupted = manifest.is_object() && manifest["complete"] == false;
  std::vector<std::string> own;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename();
    const bool shard = is_shard_name(name);
    if (!shard && name != "tokenizer.json") continue;
    if (!interrupted && std::find(listed.begin(), listed.end(), name) == listed.end())
      throw RunError(fmt::format(
          "the folder holds a file that 'train_gpt prepare' did not make, {}, choose another --out "
          "or remove it",
          entry.path().string()));
    if (shard) own.push_back(name);
  }
  return own;
}

Json describe_sources(const PrepareOptions& options) {
  Json sources = Json::array();
  for (const std::string& path : options.texts)
    sources.push_back({{"path", path},
                       {"bytes", fs::file_size(path)},
                       {"modified", fs::last_write_time(path).time_since_epoch().count()}});
  return sources;
}

Json describe_options(const PrepareOptions& options) {
  return {{"tokenizer", options.tokenizer},
          {"val_fraction", options.val_fraction},
          {"shard_tokens", options.shard_tokens}};
}

// Moves the finished files from the staging folder into DIR, in place of our older ones. The manifest is
// already in the staging folder: renames need no space, so a full disk cannot stop this half way.
void publish(const PrepareOptions& options, const std::vector<std::string>& old, const Json& manifest) {
  const std::string& out = options.out;
  const std::string staging = out + "/" + kStaging;
  write_text(staging + "/" + kManifest, json_text(manifest, 1) + "\n", Existing::replace);
  // From here to the last rename the folder is neither the old result nor the new one, and says so.
  write_text(out + "/" + kManifest, json_text(Json{{"type", kType}, {"complete", false}}, 1) + "\n",
             Existing::replace);
  for (const std::string& name : old) fs::remove(out + "/" + name);
  for (const std::string& name : listed_files(manifest)) fs::rename(staging + "/" + name, out + "/" + name);
  sync_folder(out);
  fs::rename(staging + "/" + kManifest, out + "/" + kManifest);
  sync_folder(out);
  fs::remove_all(staging);
}

void check_options(const PrepareOptions& options) {
  if (options.texts.empty()) throw UsageError("no text given, --text, name at least one file");
  if (options.out.empty()) throw UsageError("no folder given, --out, name one");
  if (!(options.val_fraction >= 0 && options.val_fraction < 1))
    throw UsageError(
        fmt::format("{} is not in [0, 1), --val-fraction, choose for example 0.01", options.val_fraction));
  if (options.shard_tokens < 1 || options.shard_tokens > kShardMaxTokens)
    throw UsageError(fmt::format("{} is not in [1, {}], --shard-tokens, choose for example 100000000",
                                 options.shard_tokens, kShardMaxTokens));
  if (options.threads < 0) throw UsageError("negative number of threads, --threads, choose 0 for all cores");
}

PrepareReport prepare_locked(const PrepareOptions& options, const PrepareProgress& progress) {
  const auto tokenizer = make_tokenizer(options.tokenizer);
  const std::vector<std::string> old = own_shards(options.out, read_manifest(options.out));

  std::vector<MappedFile> files;
  std::vector<DocumentPiece> train;
  files.reserve(options.texts.size());  // pieces point into it
  const Json sources = describe_sources(options);
  for (const std::string& path : options.texts) {
    const size_t before = train.size();
    split_documents(files.emplace_back(path, "text"), train);
    if (train.size() == before)
      throw RunError(fmt::format("the text is empty, {}, give a file with text", path));
  }
  PrepareReport report;
  report.documents = static_cast<int64_t>(train.size());
  for (const DocumentPiece& document : train) report.bytes += static_cast<int64_t>(document.text.size());
  const std::vector<DocumentPiece> val = take_validation(train, options.val_fraction, *tokenizer);

  const std::string staging = options.out + "/" + kStaging;
  fs::remove_all(staging);  // of an interrupted run
  make_folder(staging);
  try {
    Meter meter(report.bytes, progress);
    const int threads = options.threads > 0 ? options.threads : omp_get_max_threads();
    ShardSeries train_series(staging, "train", options.shard_tokens);
    ShardSeries val_series(staging, "val", options.shard_tokens);
    write_documents(train, *tokenizer, threads, train_series, meter);
    write_documents(val, *tokenizer, threads, val_series, meter);
    tokenizer->save(staging);

    Json names = Json::array();
    for (const ShardSeries* series : {&train_series, &val_series})
      for (const std::string& name : series->names())
        names.push_back({{"name", name}, {"bytes", fs::file_size(staging + "/" + name)}});
    names.push_back({{"name", "tokenizer.json"}, {"bytes", fs::file_size(staging + "/tokenizer.json")}});
    publish(options, old,
            {{"type", kType},
             {"complete", true},
             {"options", describe_options(options)},
             {"sources", sources},
             {"documents", report.documents},
             {"train_tokens", train_series.tokens()},
             {"val_tokens", val_series.tokens()},
             {"vocab_size", tokenizer->vocab_size()},
             {"files", names}});
    report.train_tokens = train_series.tokens();
    report.val_tokens = val_series.tokens();
    report.train_shards = static_cast<int>(train_series.names().size());
    report.val_shards = static_cast<int>(val_series.names().size());
    report.seconds = meter.seconds();
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(staging, ignored);
    throw;
  }
  report.vocab_size = tokenizer->vocab_size();
  return report;
}

}  // namespace

PrepareReport prepare(const PrepareOptions& options, const PrepareProgress& progress) {
  check_options(options);
  make_tokenizer(options.tokenizer);  // a wrong name is noticed before a folder is made
  for (const std::string& path : options.texts) MappedFile(path, "text");  // and so is a missing file
  make_folder(options.out);
  const FolderLock lock(options.out);
  try {
    return prepare_locked(options, progress);
  } catch (const fs::filesystem_error& error) {
    throw RunError(fmt::format("cannot make the shards ({}), {}, check the folder and its permissions",
                               error.code().message(), error.path1().string()));
  }
}

bool is_prepared(const PrepareOptions& options) {
  check_options(options);
  try {
    const Json manifest = read_manifest(options.out);
    if (!manifest.is_object() || manifest["complete"] != true) return false;
    if (manifest.value("options", Json()) != describe_options(options)) return false;
    if (manifest.value("sources", Json()) != describe_sources(options)) return false;
    for (const Json& file : manifest.at("files"))
      if (fs::file_size(options.out + "/" + file.at("name").get<std::string>()) != file.at("bytes"))
        return false;
    return true;
  } catch (const fs::filesystem_error&) {
    return false;  // a source or a result is missing: prepare() will say what
  } catch (const Json::exception&) {
    return false;
  }
}
