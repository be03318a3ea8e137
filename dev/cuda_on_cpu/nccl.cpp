#include "dev/cuda_on_cpu/nccl.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "dev/cuda_on_cpu/device_memory.h"
#include "dev/cuda_on_cpu/small_floats.h"
#include "dev/cuda_on_cpu/streams.h"

namespace fs = std::filesystem;
using cuda_on_cpu::DeviceAccess;

struct ncclComm {
  fs::path folder;
  int rank, size;
  long long exchanges = 0;  // enqueued so far
  bool aborted = false;
  ncclResult_t failure = ncclSuccess;
};
using CommOf = std::shared_ptr<ncclComm>;

namespace {
enum class Kind : int { all_reduce, reduce, reduce_scatter, broadcast, all_gather };

/// What all ranks must call alike.
struct Call {
  Kind kind;
  ncclDataType_t type;
  int root;
  size_t count;
  bool operator==(const Call&) const = default;
};

struct Exchange {
  Call call;
  const void* from;
  void* to;
};

size_t bytes_of(ncclDataType_t type) {
  return type == ncclDouble ? 8 : type == ncclFloat ? 4 : 2;
}

// ---------------------------------------------------------------------------------------------------- files
fs::path file_of(const ncclComm& comm, const std::string& what, int rank) {
  return comm.folder / (what + '.' + std::to_string(rank));
}

/// A file is there as a whole or not at all.
void publish(const fs::path& file, const Call& call = {}, const std::vector<char>& bytes = {}) {
  const fs::path unfinished = file.string() + ".tmp";
  {
    std::ofstream out(unfinished, std::ios::binary);
    out.write(reinterpret_cast<const char*>(&call), sizeof call);
    out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  }
  fs::rename(unfinished, file);
}

bool all_here(const ncclComm& comm, const std::string& what) {
  for (int r = 0; r < comm.size; ++r)
    if (!fs::exists(file_of(comm, what, r))) return false;
  return true;
}

struct Brought {
  Call call;
  std::vector<char> bytes;
};
Brought brought_by(const ncclComm& comm, const std::string& what, int rank) {
  const fs::path file = file_of(comm, what, rank);
  Brought brought;
  brought.bytes.resize(fs::file_size(file) - sizeof brought.call);
  std::ifstream in(file, std::ios::binary);
  in.read(reinterpret_cast<char*>(&brought.call), sizeof brought.call);
  in.read(brought.bytes.data(), static_cast<std::streamsize>(brought.bytes.size()));
  return brought;
}

// ------------------------------------------------------------------------------------------------- exchanges
/// What this rank brings: `count` values, those for all ranks, or nothing.
void bring(const ncclComm& comm, const std::string& name, const Exchange& e) {
  size_t count = e.call.count;
  if (e.call.kind == Kind::reduce_scatter) count *= static_cast<size_t>(comm.size);
  if (e.call.kind == Kind::broadcast && e.call.root != comm.rank) count = 0;
  std::vector<char> bytes(count * bytes_of(e.call.type));
  {
    const DeviceAccess access(DeviceAccess::From::copy);
    if (!bytes.empty())
      std::memcpy(bytes.data(), e.from, bytes.size());  // which a system call could not read
  }
  publish(file_of(comm, name, comm.rank), e.call, bytes);
}

/// sum[i] over the ranks of their value `first` + i, in the order of the ranks.
template <typename T, typename Sum>
void add_up(T* sums, const std::vector<Brought>& all, size_t first, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    Sum sum = 0;
    for (size_t r = 0; r < all.size(); ++r) {
      const auto x = static_cast<Sum>(reinterpret_cast<const T*>(all[r].bytes.data())[first + i]);
      sum = r == 0 ? x : sum + x;
    }
    sums[i] = static_cast<T>(sum);
  }
}

void add_up(const Exchange& e, const std::vector<Brought>& all, size_t first) {
  if (e.call.type == ncclDouble) add_up<double, double>(static_cast<double*>(e.to), all, first, e.call.count);
  if (e.call.type == ncclFloat) add_up<float, float>(static_cast<float*>(e.to), all, first, e.call.count);
  if (e.call.type == ncclBfloat16)
    add_up<__nv_bfloat16, float>(static_cast<__nv_bfloat16*>(e.to), all, first, e.call.count);
}

/// What this rank gets.
void receive(const ncclComm& comm, const Exchange& e, const std::vector<Brought>& all) {
  const DeviceAccess access(DeviceAccess::From::copy);
  const auto rank = static_cast<size_t>(comm.rank), root = static_cast<size_t>(e.call.root);
  const size_t bytes = e.call.count * bytes_of(e.call.type);
  if (e.call.kind == Kind::all_reduce || (e.call.kind == Kind::reduce && rank == root)) add_up(e, all, 0);
  if (e.call.kind == Kind::reduce_scatter) add_up(e, all, rank * e.call.count);
  if (e.call.kind == Kind::broadcast) std::memcpy(e.to, all[root].bytes.data(), bytes);
  if (e.call.kind == Kind::all_gather)
    for (size_t r = 0; r < all.size(); ++r)
      std::memcpy(static_cast<char*>(e.to) + r * bytes, all[r].bytes.data(), bytes);
}

void exchange(ncclComm& comm, long long number, const Exchange& e) {
  if (comm.aborted) return;
  const std::string name = std::to_string(number);
  std::vector<Brought> all;
  for (int r = 0; r < comm.size; ++r) {
    all.push_back(brought_by(comm, name, r));
    if (all.back().call == e.call) continue;
    std::fprintf(stderr, "cuda_on_cpu: NCCL: exchange %lld of rank %d is not that of rank %d\n", number, r,
                 comm.rank);
    comm.failure = ncclInvalidUsage;
    return;
  }
  receive(comm, e, all);
  // All have come to this exchange, so all have read what was brought to the one before it.
  std::error_code ignored;
  fs::remove(file_of(comm, std::to_string(number - 1), comm.rank), ignored);
}

// ---------------------------------------------------------------------------------------------------- groups
thread_local int open_groups = 0;
thread_local std::vector<std::function<ncclResult_t()>> grouped;

std::vector<CommOf>& communicators() {
  static auto* all = new std::vector<CommOf>;  // work of streams may outlive them
  return *all;
}
CommOf shared(ncclComm_t comm) {
  for (const CommOf& each : communicators())
    if (each.get() == comm) return each;
  return nullptr;
}

ncclResult_t start(const CommOf& comm, const Exchange& e, cudaStream_t stream) {
  if (comm->failure != ncclSuccess) return comm->failure;
  const long long number = comm->exchanges++;
  const auto here = std::make_shared<bool>(false);
  stream->queue.add({.work = [=] { exchange(*comm, number, e); },
                     .ready =
                         [=] {
                           if (comm->aborted) return true;
                           if (!*here) bring(*comm, std::to_string(number), e);
                           *here = true;
                           return all_here(*comm, std::to_string(number));
                         }});
  return comm->failure;
}

ncclResult_t enqueue(ncclComm_t comm, const Exchange& e, cudaStream_t stream) {
  const CommOf kept = shared(comm);
  if (!kept || stream == nullptr || cuda_on_cpu::capturing(stream)) return ncclInvalidUsage;
  const bool root_is_rank = e.call.root >= 0 && e.call.root < comm->size;
  if (!root_is_rank || e.from == nullptr || e.to == nullptr) return ncclInvalidArgument;
  if (open_groups == 0) return start(kept, e, stream);
  grouped.emplace_back([=] { return start(kept, e, stream); });
  return ncclSuccess;
}
}  // namespace

ncclResult_t ncclGroupStart() {
  ++open_groups;
  return ncclSuccess;
}
ncclResult_t ncclGroupEnd() {
  if (open_groups == 0) return ncclInvalidUsage;
  if (--open_groups > 0) return ncclSuccess;
  ncclResult_t result = ncclSuccess;
  for (const auto& begin : std::exchange(grouped, {}))
    if (result == ncclSuccess) result = begin();
  return result;
}

ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t,
                           ncclComm_t comm, cudaStream_t stream) {
  return enqueue(comm, {{Kind::all_reduce, type, 0, count}, from, to}, stream);
}
ncclResult_t ncclReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t, int root,
                        ncclComm_t comm, cudaStream_t stream) {
  return enqueue(comm, {{Kind::reduce, type, root, count}, from, to}, stream);
}
ncclResult_t ncclReduceScatter(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t,
                               ncclComm_t comm, cudaStream_t stream) {
  return enqueue(comm, {{Kind::reduce_scatter, type, 0, count}, from, to}, stream);
}
ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t stream) {
  return enqueue(comm, {{Kind::broadcast, type, root, count}, from, to}, stream);
}
ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
  return enqueue(comm, {{Kind::all_gather, type, 0, count}, from, to}, stream);
}

// --------------------------------------------------------------------------------------------- communicators
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  std::string folder = (fs::temp_directory_path() / "nccl_on_cpu.XXXXXX").string();
  if (folder.size() >= sizeof id->internal || mkdtemp(folder.data()) == nullptr) return ncclSystemError;
  *id = {};
  std::memcpy(id->internal, folder.data(), folder.size());
  return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t* comm, int size, ncclUniqueId id, int rank) {
  if (size < 1 || rank < 0 || rank >= size || !fs::is_directory(id.internal)) return ncclInvalidArgument;
  const auto made = std::make_shared<ncclComm>(ncclComm{.folder = id.internal, .rank = rank, .size = size});
  publish(file_of(*made, "joined", rank));
  while (!all_here(*made, "joined")) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  communicators().push_back(made);
  *comm = made.get();
  return ncclSuccess;
}

namespace {
/// The last one clears up.
void leave(ncclComm_t comm) {
  std::error_code ignored;
  publish(file_of(*comm, "left", comm->rank));
  if (all_here(*comm, "left")) fs::remove_all(comm->folder, ignored);
  std::erase(communicators(), shared(comm));
}
}  // namespace

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  if (!shared(comm)) return ncclInvalidArgument;
  leave(comm);
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  if (!shared(comm)) return ncclInvalidArgument;
  comm->aborted = true;
  publish(file_of(*comm, "aborted", comm->rank));
  leave(comm);
  return ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* result) {
  for (int r = 0; r < comm->size && comm->failure == ncclSuccess; ++r)
    if (r != comm->rank && fs::exists(file_of(*comm, "aborted", r))) comm->failure = ncclRemoteError;
  *result = comm->failure;
  return ncclSuccess;
}

const char* ncclGetErrorString(ncclResult_t result) {
  switch (result) {
    case ncclSuccess:
      return "no error";
    case ncclUnhandledCudaError:
      return "unhandled cuda error";
    case ncclSystemError:
      return "unhandled system error";
    case ncclInternalError:
      return "internal error";
    case ncclInvalidArgument:
      return "invalid argument";
    case ncclInvalidUsage:
      return "invalid usage";
    case ncclRemoteError:
      return "remote process exited or there was a network error";
    case ncclInProgress:
      return "in progress";
  }
  return "unknown result code";
}
const char* ncclGetLastError(ncclComm_t) {
  return "";
}
