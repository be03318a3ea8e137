#include "model/kernels/comm_mpi.h"

#include <fmt/format.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <thread>

#include "model/kernels/host_pool.h"
#include "model/kernels/mpi_carrier.h"

namespace {
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

class MpiComm final : public Comm {
 public:
  MpiComm(const Context& ctx, std::shared_ptr<MpiProcess> mpi, MpiOptions options)
      : Comm(mpi->rank(), mpi->size()),
        ctx_(ctx),
        mpi_(std::move(mpi)),
        options_(std::move(options)),
        name_(fmt::format("{} rank{} over MPI", size(), size() == 1 ? "" : "s")) {}
  ~MpiComm() override;

  const char* name() const override { return name_.c_str(); }
  void reserve(int64_t bytes) override;
  Ticket start_sum(std::span<const Tensor> tensors) override;
  Ticket start_reduce_scatter(std::span<const Part> parts) override;
  Ticket start_all_gather(std::span<const Part> parts) override;
  Ticket start_broadcast(const Tensor& tensor, int root) override;
  void finish(Ticket ticket) override;
  bool capturable() const override { return ctx_.where == Where::cpu; }
  void sum(std::span<double> values) override;
  CommCosts costs() const override;

 private:
  struct Job {
    Collective exchange;
    std::vector<Part> parts;  // in host memory
  };
  /// What finish() takes to the GPU.
  struct Staged {
    char* block = nullptr;
    std::vector<std::pair<Tensor, char*>> results;
  };

  Ticket start(Collective exchange, std::span<const Part> parts);
  Staged stage(Collective exchange, std::vector<Part>& parts);
  void deliver(const Staged& staged);
  Ticket enqueue(Job job);
  void wait(Ticket ticket);
  void add_exposed(double seconds);
  void work();
  void idle();
  /// Seconds so far, those of the exchange under way included. Under the lock.
  double busy() const { return costs_.busy + (began_ ? seconds_since(*began_) : 0); }

  const Context& ctx_;
  const std::shared_ptr<MpiProcess> mpi_;
  const MpiOptions options_;
  const std::string name_;
  const int exceptions_ = std::uncaught_exceptions();
  HostPool pool_{ctx_};
  std::map<Ticket, Staged> staged_;  // of the caller's thread

  mutable std::mutex mutex_;  // for what follows
  std::condition_variable come_, gone_;
  std::deque<Job> jobs_;  // the front one is under way
  Ticket next_ = 0, done_ = 0;
  CommCosts costs_;
  std::optional<Clock::time_point> began_;  // the exchange under way
  std::exception_ptr failure_;
  bool closing_ = false;

  std::atomic<bool> abandoned_ = false;
  Clock::time_point last_poll_ = Clock::now();
  MpiCarrier carrier_{rank(), size(), options_.parcel, [this] { idle(); }};
  std::thread worker_{[this] { work(); }};  // last: it uses all of the above
};

/// The communicator's thread.
void MpiComm::work() {
  std::unique_lock lock(mutex_);
  try {
    for (;;) {
      come_.wait(lock, [&] { return closing_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      const Job job = jobs_.front();
      began_ = Clock::now();
      lock.unlock();
      carrier_.run(job.exchange, job.parts);
      lock.lock();
      costs_.busy = busy();
      began_.reset();
      jobs_.pop_front();
      ++done_;
      gone_.notify_all();
    }
  } catch (...) {
    if (!lock.owns_lock()) lock.lock();
    began_.reset();
    failure_ = std::current_exception();
    gone_.notify_all();
  }
}

/// Called while the thread waits for messages.
void MpiComm::idle() {
  struct Abandoned {};
  if (abandoned_) throw Abandoned();
  if (!options_.poll || Clock::now() - last_poll_ < std::chrono::milliseconds(200)) return;
  last_poll_ = Clock::now();
  options_.poll();
}

MpiComm::~MpiComm() {
  // After a failure elsewhere the other ranks may never answer: what is under way is dropped.
  if (std::uncaught_exceptions() > exceptions_) abandoned_ = true;
  {
    const std::scoped_lock lock(mutex_);
    closing_ = true;
  }
  come_.notify_all();
  worker_.join();
  if (failure_ || abandoned_) mpi_->abandon();
}

void MpiComm::reserve(int64_t bytes) {
  if (size() == 1) return;
  if (ctx_.where == Where::gpu) pool_.reserve(bytes);
  const std::scoped_lock lock(mutex_);
  if (jobs_.empty()) carrier_.reserve(bytes);  // else it is in use, and will grow by itself
}

Comm::Ticket MpiComm::start_sum(std::span<const Tensor> tensors) {
  std::vector<Part> parts;
  for (const Tensor& tensor : tensors) parts.push_back({tensor, 0});
  return start(Collective::sum, parts);
}

Comm::Ticket MpiComm::start_reduce_scatter(std::span<const Part> parts) {
  return start(Collective::reduce_scatter, parts);
}

Comm::Ticket MpiComm::start_all_gather(std::span<const Part> parts) {
  return start(Collective::all_gather, parts);
}

Comm::Ticket MpiComm::start_broadcast(const Tensor& tensor, int root) {
  const Part part{tensor, root};
  return start(Collective::all_gather, {&part, 1});
}

Comm::Ticket MpiComm::start(Collective exchange, std::span<const Part> parts) {
  check_parts(exchange, parts, size());
  Job job{exchange, {parts.begin(), parts.end()}};
  Staged staged = stage(exchange, job.parts);
  const Ticket ticket = enqueue(std::move(job));
  if (staged.block != nullptr) staged_[ticket] = std::move(staged);
  return ticket;
}

/// On a GPU: copies to the host what this rank sends or adds to, and makes the parts point there.
MpiComm::Staged MpiComm::stage([[maybe_unused]] Collective exchange,
                               [[maybe_unused]] std::vector<Part>& parts) {
  Staged staged;
  if constexpr (kHaveGpu) {
    if (ctx_.where == Where::cpu || size() == 1) return staged;
    gpu::synchronize(*ctx_.device);  // what the computation takes is not the exchange's cost
    const auto start = Clock::now();
    int64_t bytes = 0;
    for (const Part& part : parts) bytes += (part.tensor.bytes() + kAlign - 1) / kAlign * kAlign;
    char* next = staged.block = pool_.take(bytes);
    for (Part& part : parts) {
      const Tensor there = part.tensor;
      const bool mine = part.owner == rank();
      if (there.size() == 0) continue;
      part.tensor.data = next;
      if (exchange != Collective::all_gather || mine)
        gpu::copy_out_async(*ctx_.device, gpu::Stream::compute, next, there.data, there.bytes());
      if (exchange == Collective::sum || mine == (exchange == Collective::reduce_scatter))
        staged.results.emplace_back(there, next);
      next += (there.bytes() + kAlign - 1) / kAlign * kAlign;
    }
    gpu::synchronize(*ctx_.device);
    add_exposed(seconds_since(start));
  }
  return staged;
}

void MpiComm::deliver([[maybe_unused]] const Staged& staged) {
  if constexpr (kHaveGpu) {
    const auto start = Clock::now();
    for (const auto& [there, here] : staged.results)
      gpu::copy_in_async(*ctx_.device, gpu::Stream::compute, there.data, here, there.bytes());
    gpu::synchronize(*ctx_.device);  // the block has another use next
    pool_.give_back(staged.block);
    add_exposed(seconds_since(start));
  }
}

/// Counts what the caller's thread did for an exchange.
void MpiComm::add_exposed(double seconds) {
  const std::scoped_lock lock(mutex_);
  costs_.busy += seconds;
  costs_.exposed += seconds;
}

Comm::Ticket MpiComm::enqueue(Job job) {
  const std::scoped_lock lock(mutex_);
  if (failure_) std::rethrow_exception(failure_);
  costs_.sent += bytes_sent(job.exchange, job.parts, rank(), size());
  jobs_.push_back(std::move(job));
  come_.notify_one();
  return next_++;
}

void MpiComm::wait(Ticket ticket) {
  std::unique_lock lock(mutex_);
  if (ticket >= next_) throw std::logic_error("Comm::finish: no such exchange");
  if (done_ > ticket) return;
  const double before = busy();
  gone_.wait(lock, [&] { return done_ > ticket || failure_; });
  costs_.exposed += busy() - before;
  if (done_ <= ticket) std::rethrow_exception(failure_);
}

void MpiComm::finish(Ticket ticket) {
  wait(ticket);
  if (const auto staged = staged_.find(ticket); staged != staged_.end()) {
    deliver(staged->second);
    staged_.erase(staged);
  }
}

void MpiComm::sum(std::span<double> values) {
  const Part part{Tensor(values.data(), {static_cast<int64_t>(values.size())}), 0};
  wait(enqueue({Collective::sum, {part}}));
}

CommCosts MpiComm::costs() const {
  const std::scoped_lock lock(mutex_);
  CommCosts costs = costs_;
  costs.busy = busy();
  return costs;
}
}  // namespace

std::shared_ptr<Comm> make_mpi_comm(const Context& ctx, std::shared_ptr<MpiProcess> mpi, MpiOptions options) {
  if (options.parcel < 8 || options.parcel > (1 << 30))
    throw std::logic_error("make_mpi_comm: parcels of 8 to 2^30 bytes");
  return std::make_shared<MpiComm>(ctx, std::move(mpi), std::move(options));
}
