// NCCL as far as programs here call it, for ranks that are processes on one machine: each GPU of the executor
// belongs to one of them (CUDA_ON_CPU_DEVICES). Declarations and values agree with NVIDIA's.
//
// An exchange is work of its stream that is ready when all ranks have come to it. Ranks meet in a folder of
// files, one for each rank and exchange: what the rank brings. The last to leave removes the folder; a job
// with a killed rank leaves it behind, in the system's temporary folder. Sums are added in the order of the
// ranks, in float32 for bf16. Ranks whose exchanges differ are told so on standard error, and
// ncclCommGetAsyncError says ncclInvalidUsage; on GPUs they would hang. After ncclCommAbort on one rank the
// others' is ncclRemoteError, and their exchanges never become ready until they abort, too.
#pragma once

#include <cstddef>

#include "dev/cuda_on_cpu/runtime.h"

enum ncclResult_t {
  ncclSuccess = 0,
  ncclUnhandledCudaError = 1,
  ncclSystemError = 2,
  ncclInternalError = 3,
  ncclInvalidArgument = 4,
  ncclInvalidUsage = 5,
  ncclRemoteError = 6,
  ncclInProgress = 7,
};
enum ncclDataType_t { ncclFloat = 7, ncclDouble = 8, ncclBfloat16 = 9 };
enum ncclRedOp_t { ncclSum = 0 };
using ncclComm_t = struct ncclComm*;
struct ncclUniqueId {
  char internal[128];
};

const char* ncclGetErrorString(ncclResult_t result);
const char* ncclGetLastError(ncclComm_t comm);
ncclResult_t ncclGetUniqueId(ncclUniqueId* id);
/// Waits for all ranks.
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int size, ncclUniqueId id, int rank);
ncclResult_t ncclCommDestroy(ncclComm_t comm);
ncclResult_t ncclCommAbort(ncclComm_t comm);
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* result);
ncclResult_t ncclGroupStart();
ncclResult_t ncclGroupEnd();
ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream);
ncclResult_t ncclReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                        int root, ncclComm_t comm, cudaStream_t stream);
/// `count` of each rank.
ncclResult_t ncclReduceScatter(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t stream);
ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t stream);
/// `count` of each rank.
ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream);
