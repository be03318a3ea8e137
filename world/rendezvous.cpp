#include "world/rendezvous.h"

#include <fmt/format.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>

#include "error.h"

namespace {
using Clock = std::chrono::steady_clock;

/// The end of a wait.
struct Deadline {
  Clock::time_point end;
  explicit Deadline(double seconds)
      : end(Clock::now() +
            std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds))) {}
  int milliseconds() const {
    return static_cast<int>(std::max<int64_t>(
        0, std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now()).count()));
  }
  double seconds() const { return milliseconds() * 1e-3; }
  bool over() const { return milliseconds() == 0; }
};

/// Closes a socket unless it was taken.
class Socket {
 public:
  explicit Socket(int fd) : fd_(fd) {}
  ~Socket() {
    if (fd_ >= 0) close(fd_);
  }
  Socket(Socket&& other) noexcept : fd_(other.take()) {}
  int fd() const { return fd_; }
  int take() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

/// Calls move(offset) whenever the socket is ready, until it has moved `bytes` bytes; false when the other
/// end is gone or the time is over.
template <typename Move>
bool transfer(int fd, int16_t when, size_t bytes, const Deadline& deadline, Move&& move) {
  for (size_t done = 0; done < bytes;) {
    pollfd ready{fd, when, 0};
    const int polled = poll(&ready, 1, deadline.milliseconds());
    if (polled < 0 && errno == EINTR) continue;
    if (polled <= 0) return false;
    const ssize_t moved = move(done);
    if (moved < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (moved <= 0) return false;
    done += static_cast<size_t>(moved);
  }
  return true;
}
bool send(int fd, const void* data, size_t bytes, const Deadline& deadline) {
  return transfer(fd, POLLOUT, bytes, deadline, [&](size_t done) {
    return ::send(fd, static_cast<const char*>(data) + done, bytes - done, MSG_NOSIGNAL | MSG_DONTWAIT);
  });
}
bool receive(int fd, void* data, size_t bytes, const Deadline& deadline) {
  return transfer(fd, POLLIN, bytes, deadline, [&](size_t done) {
    return recv(fd, static_cast<char*>(data) + done, bytes - done, MSG_DONTWAIT);
  });
}

std::string framed(const std::string& text) {
  const uint64_t bytes = text.size();
  return std::string(reinterpret_cast<const char*>(&bytes), sizeof bytes) + text;
}
/// A text as framed() wrote it.
bool receive_text(int fd, std::string& text, const Deadline& deadline) {
  constexpr uint64_t kMostBytes = 1 << 20;
  uint64_t bytes = 0;
  if (!receive(fd, &bytes, sizeof bytes, deadline) || bytes > kMostBytes) return false;
  text.resize(bytes);
  return receive(fd, text.data(), bytes, deadline);
}

/// The first thing that a rank says: whoever says something else is not one of us.
struct Hello {
  uint64_t magic = 0;
  int32_t rank = 0, size = 0;

  Hello() = default;
  Hello(int rank, int size) : magic(kMagic), rank(rank), size(size) {}
  bool ours() const { return magic == kMagic; }
  static constexpr uint64_t kMagic = 0x7470675f6e696174;
};

using Addresses = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;
Addresses resolve(const char* name, int port, int flags, std::string& why) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags;
  addrinfo* found = nullptr;
  const int status = getaddrinfo(name, std::to_string(port).c_str(), &hints, &found);
  if (status != 0) why = gai_strerror(status);
  return {status == 0 ? found : nullptr, &freeaddrinfo};
}

/// A socket that listens at all addresses of this machine.
Socket listen_at(int port, int backlog) {
  std::string why;
  const Addresses addresses = resolve(nullptr, port, AI_PASSIVE, why);
  // The version 6 one first: it takes callers of version 4 too.
  for (const int family : {AF_INET6, AF_INET})
    for (const addrinfo* a = addresses.get(); a != nullptr; a = a->ai_next) {
      if (a->ai_family != family) continue;
      Socket socket(::socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol));
      const int yes = 1, no = 0;
      setsockopt(socket.fd(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
      if (family == AF_INET6) setsockopt(socket.fd(), IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof no);
      if (bind(socket.fd(), a->ai_addr, a->ai_addrlen) == 0 && listen(socket.fd(), backlog) == 0)
        return socket;
      why = std::strerror(errno);
    }
  throw RunError(
      fmt::format("rank 0 cannot listen at port {}: {}, MASTER_PORT, choose another port", port, why));
}

/// A connection to that address, or none and why not.
Socket connect_within(const addrinfo& address, double seconds, std::string& why) {
  Socket socket(
      ::socket(address.ai_family, address.ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK, address.ai_protocol));
  if (connect(socket.fd(), address.ai_addr, address.ai_addrlen) == 0) return socket;
  int error = errno;
  if (error == EINPROGRESS) {
    pollfd ready{socket.fd(), POLLOUT, 0};
    socklen_t length = sizeof error;
    error = ETIMEDOUT;
    if (poll(&ready, 1, Deadline(seconds).milliseconds()) > 0)
      getsockopt(socket.fd(), SOL_SOCKET, SO_ERROR, &error, &length);
  }
  if (error == 0) return socket;
  why = std::strerror(error);
  return Socket(-1);
}

/// "3, 5": the ranks without a socket.
std::string list_of_missing(const std::vector<int>& sockets) {
  std::string text;
  for (size_t r = 1; r < sockets.size(); ++r)
    if (sockets[r] < 0) text += fmt::format("{}{}", text.empty() ? "" : ", ", r);
  return text;
}
}  // namespace

Rendezvous::Rendezvous(int rank, int size, const std::string& address, int port, double patience)
    : rank_(rank), size_(size), patience_(patience), sockets_(rank == 0 ? static_cast<size_t>(size) : 1, -1) {
  try {
    if (rank == 0)
      listen_for_others(port);
    else
      connect_to(address, port);
    gather("");  // comes back when rank 0 has seen all
  } catch (...) {
    close_all();
    throw;
  }
}

Rendezvous::~Rendezvous() {
  close_all();
}

void Rendezvous::close_all() {
  for (const int fd : sockets_)
    if (fd >= 0) close(fd);
}

void Rendezvous::listen_for_others(int port) {
  const Deadline deadline(patience_);
  const Socket listener = listen_at(port, size_);
  for (int missing = size_ - 1; missing > 0;) {
    pollfd ready{listener.fd(), POLLIN, 0};
    if (poll(&ready, 1, deadline.milliseconds()) <= 0) {
      if (!deadline.over()) continue;  // a signal
      throw RunError(
          fmt::format("{} of {} ranks did not come within {:g} seconds (rank {}), MASTER_PORT {}, look at "
                      "how they were started",
                      missing, size_, patience_, list_of_missing(sockets_), port));
    }
    Socket caller(accept4(listener.fd(), nullptr, nullptr, SOCK_CLOEXEC));
    Hello hello;
    const Deadline soon(2);  // a stranger must not keep the others waiting
    if (!receive(caller.fd(), &hello, sizeof hello, soon) || !hello.ours()) continue;
    const auto turn_away = [&](const std::string& why) {
      const Hello no(-1, size_);
      send(caller.fd(), &no, sizeof no, soon);
      return RunError(why);
    };
    if (hello.size != size_ || hello.rank < 1 || hello.rank >= size_)
      throw turn_away(
          fmt::format("rank {} of {} came to a job of {}, WORLD_SIZE, set it to the same everywhere",
                      hello.rank, hello.size, size_));
    int& fd = sockets_[static_cast<size_t>(hello.rank)];
    if (fd >= 0)
      throw turn_away(fmt::format("two processes are rank {}, RANK, give each its own", hello.rank));
    const Hello answer(0, size_);
    if (!send(caller.fd(), &answer, sizeof answer, soon)) continue;
    fd = caller.take();
    --missing;
  }
}

void Rendezvous::connect_to(const std::string& address, int port) {
  const Deadline deadline(patience_);
  std::string why;
  while (true) {
    const Addresses addresses = resolve(address.c_str(), port, 0, why);
    for (const addrinfo* a = addresses.get(); a != nullptr; a = a->ai_next) {
      Socket socket = connect_within(*a, std::min(deadline.seconds(), 5.0), why);
      if (socket.fd() < 0) continue;
      const Hello hello(rank_, size_);
      Hello answer;
      const bool answered = send(socket.fd(), &hello, sizeof hello, deadline) &&
                            receive(socket.fd(), &answer, sizeof answer, deadline) && answer.ours();
      if (answered && answer.rank == -1)
        throw RunError(
            fmt::format("rank 0 turned rank {} of {} away, RANK and WORLD_SIZE, give each process its own "
                        "rank of one size",
                        rank_, size_));
      // While nobody listens at a port of this machine, a caller can reach itself: then it hears its own
      // rank.
      if (answered && answer.rank == 0) {
        sockets_[0] = socket.take();
        return;
      }
      why = "what answers there is not rank 0";
    }
    if (deadline.over())
      throw RunError(
          fmt::format("rank 0 does not answer at {} port {}: {}, MASTER_ADDR and MASTER_PORT, look at "
                      "whether it was started",
                      address, port, why));
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
}

std::vector<std::string> Rendezvous::gather(const std::string& mine) {
  const Deadline deadline(patience_);
  const auto gone = [](int rank) {
    return RunError(fmt::format("it has gone or does not answer, rank {}, look for what it says", rank));
  };
  std::vector<std::string> texts(static_cast<size_t>(size_));
  if (rank_ == 0) {
    texts[0] = mine;
    std::string all = framed(mine);
    for (int r = 1; r < size_; ++r) {
      const auto i = static_cast<size_t>(r);
      if (!receive_text(sockets_[i], texts[i], deadline)) throw gone(r);
      all += framed(texts[i]);
    }
    for (int r = 1; r < size_; ++r)
      if (!send(sockets_[static_cast<size_t>(r)], all.data(), all.size(), deadline)) throw gone(r);
  } else {
    const std::string text = framed(mine);
    if (!send(sockets_[0], text.data(), text.size(), deadline)) throw gone(0);
    for (std::string& one : texts)
      if (!receive_text(sockets_[0], one, deadline)) throw gone(0);
  }
  return texts;
}
