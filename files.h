// Files, carefully: read-only maps; files and folders that have their name only when complete and on disk.
// Every failure is one RunError that names the file. Temporary names end in ".tmp", beside the final one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

/// A whole file, mapped read-only. Somebody who truncates it while it is mapped kills the process (SIGBUS).
class MappedFile {
 public:
  /// `what` names the kind of file in messages ("token shard").
  MappedFile(std::string path, const std::string& what);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  const char* data() const { return data_; }
  int64_t size() const { return size_; }
  std::string_view text() const { return {data_, static_cast<size_t>(size_)}; }
  /// Asks the system to read these bytes from the disk soon; returns at once.
  void read_ahead(int64_t start, int64_t count) const;
  /// Says that these bytes will not be read again soon, so that a long pass does not fill the memory.
  void forget(int64_t start, int64_t count) const;

 private:
  std::string path_;
  const char* data_ = nullptr;
  int64_t size_ = 0;
};

/// What to do when the final name is taken.
enum class Existing : uint8_t { refuse, replace };

/// A file under construction: written as PATH.tmp; commit() syncs it and gives it its name. Without commit()
/// the destructor removes it, so that a full disk or an exception leaves nothing.
class FileWriter {
 public:
  FileWriter(std::string path, Existing existing);
  ~FileWriter();
  FileWriter(const FileWriter&) = delete;

  /// Appends; a short or failing write is a RunError.
  void write(const void* bytes, int64_t count);
  /// Makes the file `bytes` long, zeros behind what was appended, for rewrite() to fill in any order. Takes
  /// the space at once where the file system can, so that a full disk shows before anything is written.
  void reserve(int64_t bytes);
  /// Overwrites bytes that were appended or reserved before (a header whose fields are known at the end).
  void rewrite(int64_t offset, const void* bytes, int64_t count);
  /// Bytes appended or reserved so far.
  int64_t size() const { return size_; }
  /// What was written so far is on disk, and other processes see it.
  void sync();
  /// fsync, rename, fsync of the folder. With Existing::refuse, a file that appeared meanwhile
  /// is kept and is an error.
  void commit();

 private:
  std::string path_, temporary_;
  Existing existing_;
  int fd_ = -1;
  int64_t size_ = 0;
};

/// What an unfinished file begins with, for other processes to know it by: eight bytes, new each time, and as
/// a little-endian length more than any file has.
std::string new_mark();

/// A file that another process has under construction, for writing a share of it at the same time. That
/// process has it as a FileWriter, with `mark` as its first bytes.
class FileShare {
 public:
  /// RunError when there is no such file, or one without the mark: this process then sees another folder.
  FileShare(const std::string& path, std::string_view mark);
  ~FileShare();
  FileShare(const FileShare&) = delete;

  void rewrite(int64_t offset, const void* bytes, int64_t count);
  /// The share is on disk; the last call.
  void finish();

 private:
  std::string path_;
  int fd_;
};

/// A 64-bit hash of `count` bytes, to notice differences (not malice); reads at memory speed. `seed` carries
/// on from the hash of other bytes.
uint64_t hash_bytes(const void* bytes, int64_t count, uint64_t seed = 0);
/// A 64-bit hash of a file's bytes, to notice damage (not malice); reads at memory speed.
uint64_t hash_file(const std::string& path);
/// The whole text of a small file; RunError when it is missing or larger than `limit` bytes.
std::string read_text(const std::string& path, const std::string& what, int64_t limit = 64 << 20);
/// Writes a small file atomically.
void write_text(const std::string& path, std::string_view text, Existing existing);
/// Makes a folder and its parents; RunError when a part is not a folder or cannot be made.
void make_folder(const std::string& path);
/// Makes the names inside a folder durable.
void sync_folder(const std::string& path);
/// Gives a finished folder its name, durably. With Existing::replace and a taken name the two folders swap
/// names in one step: the old one is then called `from`, for the caller to remove.
void rename_folder(const std::string& from, const std::string& to, Existing existing);

/// Keeps other processes of this program from writing into a folder at the same time: RunError when one
/// already does. Released by the destructor or the end of the process.
class FolderLock {
 public:
  explicit FolderLock(const std::string& path);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;

 private:
  int fd_;
};

/// Text out of a file for a message: in quotes, one line, printable, not too long.
std::string in_quotes(std::string_view text);
