#include "model/kernels/comm_nccl.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <deque>
#include <exception>
#include <map>

#include "error.h"
#include "model/kernels/comm_exchange.h"
#include "model/kernels/cuda.h"
#include "model/kernels/host_wait.h"
#include "model/kernels/nccl_library.h"

namespace {
using Clock = std::chrono::steady_clock;

const char* advice(ncclResult_t status) {
  switch (status) {
    case ncclInvalidUsage:
      return "give each rank a GPU of its own, and all the same NCCL";
    case ncclSystemError:
    case ncclRemoteError:
      return "look for what the other ranks say; NCCL_DEBUG=INFO shows the network, NCCL_SOCKET_IFNAME "
             "chooses "
             "one";
    default:
      return "run with NCCL_DEBUG=INFO to find the place";
  }
}

void nccl_check(ncclResult_t status, const char* what, ncclComm_t comm = nullptr) {
  if (status == ncclSuccess) return;
  throw RunError(std::string("NCCL could not ") + what + ": " + nccl().ncclGetErrorString(status) + ": " +
                 nccl().ncclGetLastError(comm) + ", NCCL, " + advice(status));
}

ncclDataType_t nccl_type(DType dtype) {
  return dtype == DType::f64 ? ncclDouble : dtype == DType::bf16 ? ncclBfloat16 : ncclFloat;
}

/// Calls that become one exchange. After a failure it is ended all the same, or nothing else, not even the
/// end of the communicator, would be more than noted.
class Group {
 public:
  explicit Group(ncclComm_t comm) : comm_(comm) {
    nccl_check(nccl().ncclGroupStart(), "begin an exchange", comm);
  }
  ~Group() {
    if (open_) nccl().ncclGroupEnd();
  }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;
  void start() {
    open_ = false;
    nccl_check(nccl().ncclGroupEnd(), "start an exchange", comm_);
  }

 private:
  const ncclComm_t comm_;
  bool open_ = true;
};

struct Event {
  cudaEvent_t event = nullptr;
  Event() { CUDA_CHECK(cudaEventCreate(&event)); }
  ~Event() { cudaEventDestroy(event); }
  Event(const Event&) = delete;
};

/// Moments of one exchange: on the communicator's stream, and on the compute stream where it is waited for.
struct Moments {
  Event begin, end, arrive, leave;
};

class NcclComm final : public Comm {
 public:
  NcclComm(const Context& ctx, const std::string& id, int rank, int size, std::function<void()> poll);
  ~NcclComm() override;

  const char* name() const override { return name_.c_str(); }
  Ticket start_sum(std::span<const Tensor> tensors) override;
  Ticket start_reduce_scatter(std::span<const Part> parts) override {
    return start(Collective::reduce_scatter, parts);
  }
  Ticket start_all_gather(std::span<const Part> parts) override {
    return start(Collective::all_gather, parts);
  }
  Ticket start_broadcast(const Tensor& tensor, int root) override {
    const Part part{tensor, root};
    return start(Collective::all_gather, {&part, 1});
  }
  void finish(Ticket ticket) override;
  void sum(std::span<double> values) override;
  CommCosts costs() const override;

 private:
  Ticket start(Collective exchange, std::span<const Part> parts);
  void enqueue(Collective exchange, std::span<const Part> parts);
  void look_after_others(bool in_sum);
  bool waits_for_others(bool in_sum) const;
  bool captures() const;

  static constexpr int64_t kNumbers = 4096;  // of the host that are summed at a time
  const std::shared_ptr<gpu::Device> device_;
  const std::function<void()> poll_;
  const std::string name_;
  const int exceptions_ = std::uncaught_exceptions();
  ncclComm_t comm_ = nullptr;
  cudaStream_t stream_ = nullptr;
  Memory numbers_;
  Event ready_;  // the compute stream has made what is to be exchanged
  Ticket next_ = 0;
  std::map<Ticket, std::unique_ptr<Moments>> under_way_;
  mutable std::vector<std::unique_ptr<Moments>> free_;
  mutable std::deque<std::unique_ptr<Moments>> to_measure_;  // finished, in the order of finish()
  mutable CommCosts costs_;
};

NcclComm::NcclComm(const Context& ctx, const std::string& id, int rank, int size, std::function<void()> poll)
    : Comm(rank, size),
      device_(ctx.device),
      poll_(std::move(poll)),
      name_(std::to_string(size) + (size == 1 ? " rank" : " ranks") + " over NCCL"),
      numbers_(ctx, kNumbers * int64_t{sizeof(double)}, "sums over ranks") {
  ncclUniqueId unique;
  if (id.size() != sizeof unique.internal) throw std::logic_error("make_nccl_comm: an id has 128 bytes");
  std::memcpy(unique.internal, id.data(), sizeof unique.internal);
  nccl_check(nccl().ncclCommInitRank(&comm_, size, unique, rank), "join the ranks");
  // Blocks of an exchange go before those of the computation that wait for a place: others wait for them.
  int least = 0, greatest = 0;
  CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  CUDA_CHECK(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest));
  gpu::synchronize(*device_);  // numbers_ is filled with zeros there
  device_->while_waiting = [this] { look_after_others(/*in_sum=*/false); };
}

NcclComm::~NcclComm() {
  device_->while_waiting = nullptr;
  ncclResult_t state = ncclSuccess;
  nccl().ncclCommGetAsyncError(comm_, &state);
  // After a failure the other ranks may be gone: nothing may be waited for.
  if (state != ncclSuccess || std::uncaught_exceptions() > exceptions_)
    nccl().ncclCommAbort(comm_);
  else
    nccl().ncclCommDestroy(comm_);
  cudaStreamDestroy(stream_);
}

bool NcclComm::captures() const {
  cudaStreamCaptureStatus status;
  CUDA_CHECK(cudaStreamIsCapturing(device_->stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

Comm::Ticket NcclComm::start_sum(std::span<const Tensor> tensors) {
  std::vector<Part> parts;
  for (const Tensor& tensor : tensors) parts.push_back({tensor, 0});
  return start(Collective::sum, parts);
}

Comm::Ticket NcclComm::start(Collective exchange, std::span<const Part> parts) {
  check_parts(exchange, parts, size());
  costs_.sent += bytes_sent(exchange, parts, rank(), size());
  std::unique_ptr<Moments> moments;
  if (free_.empty()) {
    moments = std::make_unique<Moments>();
  } else {
    moments = std::move(free_.back());
    free_.pop_back();
  }
  CUDA_CHECK(cudaEventRecord(ready_.event, device_->stream));
  CUDA_CHECK(cudaStreamWaitEvent(stream_, ready_.event, 0));
  CUDA_CHECK(cudaEventRecord(moments->begin.event, stream_));
  enqueue(exchange, parts);
  CUDA_CHECK(cudaEventRecord(moments->end.event, stream_));
  under_way_[next_] = std::move(moments);
  return next_++;
}

void NcclComm::enqueue(Collective exchange, std::span<const Part> parts) {
  Group group(comm_);
  if (exchange == Collective::sum)
    for (const auto& [t, owner] : parts)
      nccl_check(nccl().ncclAllReduce(t.data, t.data, static_cast<size_t>(t.size()), nccl_type(t.dtype),
                                      ncclSum, comm_, stream_),
                 "sum", comm_);
  else
    for (const OwnerRun& run : find_runs(parts, size())) {
      const auto count = static_cast<size_t>(run.count);
      const ncclDataType_t type = nccl_type(run.dtype);
      char* mine = run.data + rank() * run.count * dtype_bytes(run.dtype);
      const bool one_each = run.owner == OwnerRun::kOneEach;
      if (exchange == Collective::reduce_scatter)
        nccl_check(
            one_each ? nccl().ncclReduceScatter(run.data, mine, count, type, ncclSum, comm_, stream_)
                     : nccl().ncclReduce(run.data, run.data, count, type, ncclSum, run.owner, comm_, stream_),
            "sum at the owners", comm_);
      else
        nccl_check(one_each
                       ? nccl().ncclAllGather(mine, run.data, count, type, comm_, stream_)
                       : nccl().ncclBroadcast(run.data, run.data, count, type, run.owner, comm_, stream_),
                   "hand out what the owners have", comm_);
    }
  group.start();
}

void NcclComm::finish(Ticket ticket) {
  if (ticket >= next_) throw std::logic_error("Comm::finish: no such exchange");
  const auto found = under_way_.find(ticket);
  if (found == under_way_.end()) return;  // finished before
  const bool measured = !captures();
  const Moments& moments = *found->second;
  CUDA_CHECK(cudaEventRecord(moments.arrive.event, device_->stream));
  CUDA_CHECK(cudaStreamWaitEvent(device_->stream, moments.end.event, 0));
  CUDA_CHECK(cudaEventRecord(moments.leave.event, device_->stream));
  // What a graph recorded has no times.
  if (measured)
    to_measure_.push_back(std::move(found->second));
  else
    free_.push_back(std::move(found->second));
  under_way_.erase(found);
  if (measured) costs();  // so that the list stays short
}

CommCosts NcclComm::costs() const {
  while (!to_measure_.empty()) {
    const Moments& m = *to_measure_.front();
    const cudaError_t state = cudaEventQuery(m.leave.event);
    if (state == cudaErrorNotReady) break;
    CUDA_CHECK(state);
    float busy = 0, exposed = 0;  // milliseconds
    CUDA_CHECK(cudaEventElapsedTime(&busy, m.begin.event, m.end.event));
    CUDA_CHECK(cudaEventElapsedTime(&exposed, m.arrive.event, m.leave.event));
    // Who arrives before it has begun waits for other work first.
    costs_.busy += busy * 1e-3;
    costs_.exposed += std::min(busy, exposed) * 1e-3;
    free_.push_back(std::move(to_measure_.front()));
    to_measure_.pop_front();
  }
  return costs_;
}

/// While the host waits. A rank whose stream stands in an exchange waits for others, and says so by poll_();
/// one that has not come there is at work, or hangs itself.
void NcclComm::look_after_others(bool in_sum) {
  ncclResult_t async = ncclSuccess;
  nccl_check(nccl().ncclCommGetAsyncError(comm_, &async), "say how it is", comm_);
  nccl_check(async, "go on", comm_);
  if (poll_ && waits_for_others(in_sum)) poll_();
}

/// `in_sum`: behind all exchanges stands a sum of the host's numbers.
bool NcclComm::waits_for_others(bool in_sum) const {
  bool all_over = true, in_exchange = false;
  const auto look_at = [&](const Moments& m) {
    if (cudaEventQuery(m.end.event) == cudaSuccess) return;
    all_over = false;
    in_exchange = in_exchange || cudaEventQuery(m.begin.event) == cudaSuccess;
  };
  for (const auto& [ticket, moments] : under_way_) look_at(*moments);
  for (const auto& moments : to_measure_) look_at(*moments);
  return all_over ? in_sum : in_exchange;
}

void NcclComm::sum(std::span<double> values) {
  const auto start = Clock::now();
  auto* there = reinterpret_cast<double*>(numbers_.data());
  for (size_t done = 0; done < values.size();) {
    const std::span<double> some = values.subspan(done, std::min<size_t>(values.size() - done, kNumbers));
    CUDA_CHECK(cudaMemcpyAsync(there, some.data(), some.size_bytes(), cudaMemcpyHostToDevice, stream_));
    nccl_check(nccl().ncclAllReduce(there, there, some.size(), ncclDouble, ncclSum, comm_, stream_),
               "sum numbers", comm_);
    wait_until([&] { return cudaStreamQuery(stream_); }, [&] { look_after_others(/*in_sum=*/true); });
    CUDA_CHECK(cudaMemcpyAsync(some.data(), there, some.size_bytes(), cudaMemcpyDeviceToHost, stream_));
    CUDA_CHECK(cudaStreamSynchronize(stream_));
    done += some.size();
  }
  costs_.sent += (size() - 1) * static_cast<int64_t>(values.size_bytes());
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  costs_.busy += seconds;
  costs_.exposed += seconds;
}
}  // namespace

std::string nccl_device(const Context& ctx) {
  char bus[64] = "";
  CUDA_CHECK(cudaDeviceGetPCIBusId(bus, sizeof bus, ctx.device->index));
  return bus;
}

std::string nccl_unique_id() {
  ncclUniqueId id;
  nccl_check(nccl().ncclGetUniqueId(&id), "begin a job");
  return {id.internal, sizeof id.internal};
}

std::shared_ptr<Comm> make_nccl_comm(const Context& ctx, const std::string& id, int rank, int size,
                                     std::function<void()> poll) {
  return std::make_shared<NcclComm>(ctx, id, rank, size, std::move(poll));
}
