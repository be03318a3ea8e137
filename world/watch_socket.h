// TCP as the watch needs it: connections that carry JSON, one object per line, and never block; IPv4 and
// IPv6.
#pragma once

#include <poll.h>

#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

/// One end of a connection. Closed: open() is false, what is sent goes nowhere.
class Connection {
 public:
  Connection() = default;
  /// Takes a connected socket.
  explicit Connection(int socket);
  Connection(Connection&& other) noexcept;
  Connection& operator=(Connection&& other) noexcept;
  ~Connection();

  bool open() const { return socket_ >= 0; }
  int socket() const { return socket_; }
  /// The events to poll() for.
  short events() const;
  /// Sends what the system takes now, keeps the rest.
  void send(const nlohmann::json& message);
  void send_rest();
  /// The messages that have come. Closes when the other end did, or when it does not speak this language.
  std::vector<nlohmann::json> receive();
  /// From now on much longer messages are legal.
  void trust() { limit_ = size_t{64} << 20; }
  /// Tells the other end that nothing more comes, once all is sent.
  void finish_sending();
  void close();

 private:
  int socket_ = -1;
  size_t limit_ = size_t{64} << 10;  // bytes of a message
  std::string in_, out_;
};

/// A port that the system chose, on all interfaces. RunError when there is none.
class Listener {
 public:
  Listener();
  ~Listener();
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  int socket() const { return socket_; }
  int port() const;
  /// A connection that waits to be accepted; closed when there is none.
  Connection accept() const;

 private:
  int socket_ = -1;
};

/// Where a process can be reached.
struct Endpoint {
  std::vector<std::string> addresses;  // numbers or names, the better ones first
  int port = 0;
};
void to_json(nlohmann::json& json, const Endpoint& endpoint);
void from_json(const nlohmann::json& json, Endpoint& endpoint);

std::string host_name();
/// Of this machine: its interfaces, its name, loopback.
std::vector<std::string> own_addresses();
/// Tries all addresses for up to `seconds`, again and again when `insist`. Closed when none answered; then
/// `why` says what the last attempt met.
Connection connect_to(const Endpoint& endpoint, double seconds, bool insist, std::string& why);

/// Messages from other threads for one that sleeps in poll().
class Mailbox {
 public:
  Mailbox();
  ~Mailbox();
  Mailbox(const Mailbox&) = delete;
  Mailbox& operator=(const Mailbox&) = delete;

  /// Readable while there are messages.
  int descriptor() const { return event_; }
  void post(nlohmann::json message);
  std::vector<nlohmann::json> take();

 private:
  int event_ = -1;
  std::mutex mutex_;
  std::vector<nlohmann::json> messages_;
};

/// Seconds on a clock that only goes forward.
double clock_seconds();
/// poll() until one of them has an event, or `seconds` have passed.
void wait_for(std::vector<pollfd>& descriptors, double seconds);
