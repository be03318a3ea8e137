#include "files.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <random>
#include <system_error>
#include <utility>

#include <fmt/format.h>

#include "error.h"
#include "random.h"

namespace {

// One line for a failing system call: what, why, which file, what to do.
[[noreturn]] void fail(const std::string& what, const std::string& path, int error) {
  const char* advice = "check the path and its permissions";
  if (error == ENOSPC || error == EDQUOT) advice = "free some space or choose another folder";
  if (error == EIO) advice = "check the disk";
  throw RunError(fmt::format("{} ({}), {}, {}", what, std::strerror(error), path, advice));
}

// Opens a regular file for reading. O_NONBLOCK: opening a pipe that nobody writes to must not wait for ever.
int open_regular(const std::string& path, const std::string& what, int64_t* size) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) fail(fmt::format("cannot open the {}", what), path, errno);
  struct stat info {};
  if (::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    ::close(fd);
    throw RunError(fmt::format("the {} is not a regular file, {}, name a file", what, path));
  }
  *size = info.st_size;
  return fd;
}

void write_all(int fd, const void* bytes, int64_t count, int64_t offset, const std::string& path) {
  const char* from = static_cast<const char*>(bytes);
  while (count > 0) {
    const ssize_t written =
        ::pwrite(fd, from, static_cast<size_t>(std::min<int64_t>(count, 1 << 30)), offset);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) fail("cannot write", path, written == 0 ? ENOSPC : errno);
    from += written, offset += written, count -= written;
  }
}

std::string folder_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

// Rename that fails with EEXIST rather than replace.
int rename_new(const char* from, const char* to) {
  if (::renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE) == 0) return 0;
  if (errno != EINVAL && errno != ENOSYS) return errno;
  // Some network file systems lack the flag; then the check and the rename are two steps.
  if (::access(to, F_OK) == 0) return EEXIST;
  return ::rename(from, to) == 0 ? 0 : errno;
}

[[noreturn]] void fail_taken(const std::string& path) {
  throw RunError(fmt::format(
      "the name is taken and nothing is overwritten, {}, choose another name or remove it", path));
}

}  // namespace

MappedFile::MappedFile(std::string path, const std::string& what) : path_(std::move(path)) {
  const int fd = open_regular(path_, what, &size_);
  if (size_ > 0) {  // an empty map is not allowed; data_ stays null
    void* map = ::mmap(nullptr, static_cast<size_t>(size_), PROT_READ, MAP_SHARED, fd, 0);
    const int error = errno;
    if (map == MAP_FAILED) {
      ::close(fd);
      fail(fmt::format("cannot map the {} into memory", what), path_, error);
    }
    data_ = static_cast<const char*>(map);
  }
  ::close(fd);
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<char*>(data_), static_cast<size_t>(size_));
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

namespace {
// madvise on the pages that hold [start, start + count), clipped to the file. Advice may be ignored: no
// error.
void advise(const char* data, int64_t size, int64_t start, int64_t count, int advice) {
  const int64_t page = ::sysconf(_SC_PAGESIZE);
  const int64_t begin = std::clamp<int64_t>(start, 0, size) / page * page;
  const int64_t end = std::clamp<int64_t>(start + count, 0, size);
  if (begin < end) ::madvise(const_cast<char*>(data) + begin, static_cast<size_t>(end - begin), advice);
}
}  // namespace

void MappedFile::read_ahead(int64_t start, int64_t count) const {
  advise(data_, size_, start, count, MADV_WILLNEED);
}
void MappedFile::forget(int64_t start, int64_t count) const {
  advise(data_, size_, start, count, MADV_DONTNEED);
}

FileWriter::FileWriter(std::string path, Existing existing)
    : path_(std::move(path)), temporary_(path_ + ".tmp"), existing_(existing) {
  if (existing == Existing::refuse && ::access(path_.c_str(), F_OK) == 0) fail_taken(path_);
  // Not O_TRUNC: the file may belong to another process until the lock is ours.
  fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
  if (fd_ < 0) fail("cannot write", path_, errno);
  const bool locked = ::flock(fd_, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK;
  // The other process may have renamed its file between our open and our lock: then this is not a .tmp any
  // more.
  struct stat mine {
  }, named{};
  const bool same = ::fstat(fd_, &mine) == 0 && ::stat(temporary_.c_str(), &named) == 0 &&
                    mine.st_ino == named.st_ino && mine.st_dev == named.st_dev;
  if (!locked || !same) {
    ::close(fd_);
    throw RunError(
        fmt::format("another process is writing the file, {}, wait for it or choose another name", path_));
  }
  if (::ftruncate(fd_, 0) != 0) {
    const int error = errno;
    ::close(fd_);
    fail("cannot write", path_, error);
  }
}

FileWriter::~FileWriter() {
  if (fd_ < 0) return;
  ::unlink(temporary_.c_str());
  ::close(fd_);
}

void FileWriter::write(const void* bytes, int64_t count) {
  write_all(fd_, bytes, count, size_, path_);
  size_ += count;
}

void FileWriter::reserve(int64_t bytes) {
  if (bytes < size_) throw std::logic_error("FileWriter::reserve: fewer bytes than were written");
  int error = 0;
  do {
    // Not posix_fallocate, which writes a byte into every block where the file system cannot do this.
    error = bytes == 0 || ::fallocate(fd_, 0, 0, bytes) == 0 ? 0 : errno;
  } while (error == EINTR);
  if (error == EOPNOTSUPP || error == ENOSYS) error = ::ftruncate(fd_, bytes) == 0 ? 0 : errno;
  if (error != 0) fail("cannot write", path_, error);
  size_ = bytes;
}

void FileWriter::rewrite(int64_t offset, const void* bytes, int64_t count) {
  if (offset < 0 || count > size_ - offset)
    throw std::logic_error("FileWriter::rewrite: outside of what was written");
  write_all(fd_, bytes, count, offset, path_);
}

void FileWriter::sync() {
  if (::fsync(fd_) != 0) fail("cannot write", path_, errno);
}

void FileWriter::commit() {
  sync();
  const int error = existing_ == Existing::refuse ? rename_new(temporary_.c_str(), path_.c_str())
                    : ::rename(temporary_.c_str(), path_.c_str()) != 0 ? errno
                                                                       : 0;
  if (error == EEXIST && existing_ == Existing::refuse) fail_taken(path_);
  if (error != 0) fail("cannot give the finished file its name", path_, error);
  if (::close(std::exchange(fd_, -1)) != 0) fail("cannot write", path_, errno);
  sync_folder(folder_of(path_));
}

std::string new_mark() {
  std::random_device device;
  const uint64_t bits = uint64_t{device()} << 32 | device() | uint64_t{1} << 63;
  return {reinterpret_cast<const char*>(&bits), sizeof bits};
}

FileShare::FileShare(const std::string& path, std::string_view mark) : path_(path) {
  fd_ = ::open((path + ".tmp").c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW);
  const auto elsewhere = [&](const std::string& why) {
    return RunError(
        fmt::format("this process does not see the file that another one has begun ({}), {}, use a folder "
                    "that all of them share",
                    why, path));
  };
  if (fd_ < 0) throw elsewhere(std::strerror(errno));
  std::string there(mark.size(), '\0');
  const ssize_t got = ::pread(fd_, there.data(), there.size(), 0);
  if (got == static_cast<ssize_t>(mark.size()) && there == mark) return;
  ::close(fd_);
  throw elsewhere("there is another file of this name");
}

FileShare::~FileShare() {
  if (fd_ >= 0) ::close(fd_);
}

void FileShare::rewrite(int64_t offset, const void* bytes, int64_t count) {
  write_all(fd_, bytes, count, offset, path_);
}

void FileShare::finish() {
  if (::fsync(fd_) != 0 || ::close(std::exchange(fd_, -1)) != 0) fail("cannot write", path_, errno);
}

std::string read_text(const std::string& path, const std::string& what, int64_t limit) {
  int64_t size = 0;
  const int fd = open_regular(path, what, &size);
  std::string text;
  int error = 0;
  if (size <= limit) {
    text.resize(static_cast<size_t>(size));
    for (size_t have = 0; have < text.size();) {
      const ssize_t got = ::read(fd, text.data() + have, text.size() - have);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) error = errno;
      if (got <= 0)
        text.resize(have);  // it shrank while we read, or cannot be read
      else
        have += static_cast<size_t>(got);
    }
  }
  ::close(fd);
  if (error != 0) fail(fmt::format("cannot read the {}", what), path, error);
  if (size > limit)
    throw RunError(
        fmt::format("the {} has {} bytes, {}, it should have at most {}", what, size, path, limit));
  return text;
}

void write_text(const std::string& path, std::string_view text, Existing existing) {
  FileWriter file(path, existing);
  file.write(text.data(), static_cast<int64_t>(text.size()));
  file.commit();
}

void make_folder(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) fail("cannot make the folder", path, error.value());
  if (!std::filesystem::is_directory(path, error)) fail("cannot make the folder", path, ENOTDIR);
}

void sync_folder(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) fail("cannot open the folder", path, errno);
  const bool failed = ::fsync(fd) != 0;
  const int error = errno;
  ::close(fd);
  // EINVAL: a file system that has no such thing for folders.
  if (failed && error != EINVAL) fail("cannot write the folder to disk", path, error);
}

void rename_folder(const std::string& from, const std::string& to, Existing existing) {
  int error = rename_new(from.c_str(), to.c_str());
  if (error == EEXIST && existing == Existing::refuse) fail_taken(to);
  if (error == EEXIST) {
    // Swap the two in one step, so that one of them has the name at every moment; the caller removes the old
    // one.
    error = ::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_EXCHANGE) == 0 ? 0 : errno;
  }
  if (error != 0) fail("cannot give the finished folder its name", to, error);
  sync_folder(folder_of(to));
}

FolderLock::FolderLock(const std::string& path) {
  fd_ = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd_ < 0) fail("cannot open the folder", path, errno);
  if (::flock(fd_, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) return;  // no locks here: go on without
  ::close(fd_);
  throw RunError(
      fmt::format("another process is writing into the folder, {}, wait for it or choose another one", path));
}

FolderLock::~FolderLock() {
  ::close(fd_);
}

std::string in_quotes(std::string_view text) {
  std::string out = "'";
  for (const char c : text.substr(0, 80)) {
    const auto byte = static_cast<unsigned char>(c);
    out += byte < 0x20 || byte >= 0x7f ? fmt::format("\\x{:02x}", byte) : std::string(1, c);
  }
  return out + (text.size() > 80 ? "...'" : "'");
}

uint64_t hash_bytes(const void* bytes, int64_t count, uint64_t seed) {
  // Four independent lanes of multiply and rotate, folded at the end: one word per cycle instead of one byte.
  uint64_t lanes[4] = {1, 2, 3, 4};
  const auto* const data = static_cast<const unsigned char*>(bytes);
  const auto size = static_cast<size_t>(count);
  const auto absorb = [&](size_t lane, uint64_t word) {
    lanes[lane] = std::rotl((lanes[lane] ^ word) * 0x9E3779B97F4A7C15ull, 29);
  };
  size_t at = 0;
  for (; at + 32 <= size; at += 32) {
    uint64_t words[4];
    std::memcpy(words, data + at, 32);
    for (size_t lane = 0; lane < 4; ++lane) absorb(lane, words[lane]);
  }
  for (; at < size; ++at) absorb(0, data[at]);
  uint64_t hash = mix_bits(size ^ seed);
  for (const uint64_t lane : lanes) hash = mix_bits(hash ^ lane);
  return hash;
}

uint64_t hash_file(const std::string& path) {
  const MappedFile file(path, "file");
  return hash_bytes(file.data(), file.size());
}
