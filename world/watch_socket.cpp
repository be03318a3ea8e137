#include "world/watch_socket.h"

#include <fmt/format.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>

#include "error.h"
#include "json_text.h"

using nlohmann::json;

double clock_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void wait_for(std::vector<pollfd>& descriptors, double seconds) {
  // Rounded up: a wait that ends too early would be made again at once.
  const int milliseconds = static_cast<int>(std::ceil(std::clamp(seconds, 0.0, 3600.0) * 1e3));
  if (poll(descriptors.data(), descriptors.size(), milliseconds) >= 0) return;
  for (pollfd& descriptor : descriptors) descriptor.revents = 0;  // a signal
}

// -------------------------------------------------------------------------------------------------
// connections
Connection::Connection(int socket) : socket_(socket) {
  const int on = 1;  // small messages that somebody waits for
  setsockopt(socket_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

Connection::Connection(Connection&& other) noexcept
    : socket_(std::exchange(other.socket_, -1)),
      limit_(other.limit_),
      in_(std::move(other.in_)),
      out_(std::move(other.out_)) {}

Connection& Connection::operator=(Connection&& other) noexcept {
  std::swap(socket_, other.socket_);
  std::swap(limit_, other.limit_);
  in_.swap(other.in_);
  out_.swap(other.out_);
  return *this;
}

Connection::~Connection() {
  close();
}

void Connection::close() {
  if (socket_ >= 0) ::close(std::exchange(socket_, -1));
}

short Connection::events() const {
  return static_cast<short>(out_.empty() ? POLLIN : POLLIN | POLLOUT);
}

void Connection::send(const json& message) {
  if (!open()) return;
  out_ += lossy_json_text(message, Characters::utf8) + "\n";
  send_rest();
}

void Connection::send_rest() {
  while (open() && !out_.empty()) {
    const ssize_t sent = ::send(socket_, out_.data(), out_.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent > 0) {
      out_.erase(0, static_cast<size_t>(sent));
    } else if (sent < 0 && errno == EINTR) {
      continue;
    } else {
      // A broken connection is noticed by receive(), after what the other end still said.
      if (errno != EAGAIN && errno != EWOULDBLOCK) out_.clear();
      return;
    }
  }
}

std::vector<json> Connection::receive() {
  std::vector<json> messages;
  std::array<char, 65536> bytes;
  while (open()) {
    const ssize_t got = ::recv(socket_, bytes.data(), bytes.size(), MSG_DONTWAIT);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) break;
    if (got <= 0) {
      close();
      break;
    }
    in_.append(bytes.data(), static_cast<size_t>(got));
    size_t start = 0;
    for (size_t end; (end = in_.find('\n', start)) != std::string::npos; start = end + 1) {
      json message = parse_json(std::string_view(in_).substr(start, end - start));
      if (!message.is_object() || !message.contains("say") || !message["say"].is_string()) {
        close();
        return messages;
      }
      messages.push_back(std::move(message));
    }
    in_.erase(0, start);
    if (in_.size() > limit_) close();
  }
  return messages;
}

void Connection::finish_sending() {
  send_rest();
  if (open()) shutdown(socket_, SHUT_WR);
}

// ---------------------------------------------------------------------------------------------------
// addresses
Listener::Listener() {
  const int off = 0;
  socket_ = ::socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  sockaddr_in6 six{};
  six.sin6_family = AF_INET6;
  if (socket_ >= 0) {  // both kinds of addresses
    setsockopt(socket_, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (bind(socket_, reinterpret_cast<const sockaddr*>(&six), sizeof six) != 0)
      ::close(std::exchange(socket_, -1));
  }
  if (socket_ < 0) {  // a machine without IPv6
    sockaddr_in four{};
    four.sin_family = AF_INET;
    socket_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (socket_ >= 0 && bind(socket_, reinterpret_cast<const sockaddr*>(&four), sizeof four) != 0)
      ::close(std::exchange(socket_, -1));
  }
  if (socket_ >= 0 && listen(socket_, SOMAXCONN) == 0) return;
  const std::string why = std::strerror(errno);
  if (socket_ >= 0) ::close(socket_);
  throw RunError(fmt::format(
      "cannot listen for the other ranks ({}), a TCP port, look at the limits of the machine", why));
}

Listener::~Listener() {
  ::close(socket_);
}

int Listener::port() const {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  getsockname(socket_, reinterpret_cast<sockaddr*>(&address), &size);
  return ntohs(address.ss_family == AF_INET6 ? reinterpret_cast<const sockaddr_in6&>(address).sin6_port
                                             : reinterpret_cast<const sockaddr_in&>(address).sin_port);
}

Connection Listener::accept() const {
  const int socket = accept4(socket_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  return socket < 0 ? Connection() : Connection(socket);
}

void to_json(json& json, const Endpoint& endpoint) {
  json = {{"addresses", endpoint.addresses}, {"port", endpoint.port}};
}

void from_json(const json& json, Endpoint& endpoint) {
  json.at("addresses").get_to(endpoint.addresses);
  json.at("port").get_to(endpoint.port);
}

std::string host_name() {
  std::array<char, 256> name{};
  if (gethostname(name.data(), name.size() - 1) != 0 || name[0] == 0) return "localhost";
  return name.data();
}

std::vector<std::string> own_addresses() {
  std::vector<std::string> addresses;
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) == 0) {
    const std::unique_ptr<ifaddrs, void (*)(ifaddrs*)> owner(list, freeifaddrs);
    for (const ifaddrs* item = list; item != nullptr; item = item->ifa_next) {
      if (item->ifa_addr == nullptr || (item->ifa_flags & IFF_UP) == 0 ||
          (item->ifa_flags & IFF_LOOPBACK) != 0)
        continue;
      const int family = item->ifa_addr->sa_family;
      if (family != AF_INET && family != AF_INET6) continue;
      std::array<char, NI_MAXHOST> text{};
      const socklen_t size = family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
      if (getnameinfo(item->ifa_addr, size, text.data(), text.size(), nullptr, 0, NI_NUMERICHOST) != 0)
        continue;
      const std::string address = text.data();
      if (address.find('%') == std::string::npos) addresses.push_back(address);  // not of one link only
    }
  }
  addresses.insert(addresses.end(), {host_name(), "127.0.0.1", "::1"});
  return addresses;
}

namespace {
using Found = std::unique_ptr<addrinfo, void (*)(addrinfo*)>;

/// One attempt; closed when it fails or takes longer.
Connection connect_once(const addrinfo& address, double seconds, std::string& why) {
  const int socket = ::socket(address.ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (socket < 0) {
    why = std::strerror(errno);
    return {};
  }
  Connection connection(socket);
  if (connect(socket, address.ai_addr, address.ai_addrlen) != 0 && errno != EINPROGRESS) {
    why = std::strerror(errno);
    return {};
  }
  std::vector<pollfd> descriptors = {{socket, POLLOUT, 0}};
  wait_for(descriptors, seconds);
  int error = descriptors[0].revents == 0 ? ETIMEDOUT : 0;
  socklen_t size = sizeof error;
  if (error == 0) getsockopt(socket, SOL_SOCKET, SO_ERROR, &error, &size);
  why = error == 0 ? "" : std::strerror(error);
  return error == 0 ? std::move(connection) : Connection();
}
}  // namespace

Connection connect_to(const Endpoint& endpoint, double seconds, bool insist, std::string& why) {
  constexpr double kAttempt = 2;   // seconds for one address
  constexpr double kPause = 0.05;  // seconds between rounds
  const double end = clock_seconds() + seconds;
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  do {
    for (const std::string& name : endpoint.addresses) {
      addrinfo* list = nullptr;
      const int error = getaddrinfo(name.c_str(), std::to_string(endpoint.port).c_str(), &hints, &list);
      const Found found(list, freeaddrinfo);
      if (error != 0) why = gai_strerror(error);
      for (const addrinfo* item = error == 0 ? list : nullptr; item != nullptr; item = item->ai_next) {
        const double left = end - clock_seconds();
        if (left <= 0) return {};
        if (Connection connection = connect_once(*item, std::min(left, kAttempt), why); connection.open())
          return connection;
      }
    }
    std::vector<pollfd> nothing;
    if (insist) wait_for(nothing, std::min(kPause, end - clock_seconds()));
  } while (insist && clock_seconds() < end);
  return {};
}

// -----------------------------------------------------------------------------------------------------
// mailbox
Mailbox::Mailbox() : event_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (event_ < 0)
    throw RunError(
        fmt::format("cannot open an event ({}), the limit of open files, raise it", std::strerror(errno)));
}

Mailbox::~Mailbox() {
  ::close(event_);
}

void Mailbox::post(json message) {
  const std::lock_guard lock(mutex_);
  messages_.push_back(std::move(message));
  eventfd_write(event_, 1);
}

std::vector<json> Mailbox::take() {
  const std::lock_guard lock(mutex_);
  eventfd_t count = 0;
  eventfd_read(event_, &count);
  return std::exchange(messages_, {});
}
