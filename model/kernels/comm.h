// The communicator: how the ranks of one job, each a process with a Context of its own, sum gradients and
// hand out weights. Rank r of N = size(), 0 <= r < N.
//
//                     what happens                                      bytes that a rank sends
//   sum               t <- sum over ranks of t, on all ranks            (N-1) |t|: for small t
//   reduce_scatter    part <- sum over ranks of part, on its owner      the parts of the others: (N-1)/N S
//   all_gather        part <- the owner's part, on all ranks            (N-1) times its own: (N-1)/N S
//   broadcast         t <- the root's t, on all ranks                   the root (N-1) |t|
//
// S: bytes of all parts, when all ranks own the same. A list of parts is one exchange, however many tensors
// it has; a part that no rank but its owner needs (after a reduce_scatter) is left undefined elsewhere. Parts
// of one owner need not lie next to each other: matrices are owned whole, wherever they are.
//
// Every rank makes the same calls with the same shapes in the same order. start_*() comes back at once; the
// exchange happens behind all work enqueued on ctx so far, in the order of the calls, beside what is enqueued
// later. finish(ticket) makes later work see the result. Between the two the tensors belong to the exchange.
//
// Sums are made in the order of the ranks, ((t_0 + t_1) + t_2) + ..., so N processes with a micro-batch each
// add what one process with N micro-batches adds, reruns have the same bits, and all ranks the same bits as
// each other. (NCCL has an order of its own: equal from run to run on the same machines, with
// NCCL_ALGO=Ring.)
//
// Three backends: a single process (this class itself: every exchange is done before it began); MPI between
// processes on CPUs, and staged through page-locked memory between GPUs or for several ranks on one GPU,
// which NCCL refuses (comm_mpi.h); NCCL between GPUs (comm_nccl.h). tests/test_comm.cpp is the contract of
// all.
#pragma once

#include <cstdint>
#include <span>

#include "model/kernels/tensor.h"

/// A piece of a larger whole and the rank that it belongs to.
struct Part {
  Tensor tensor;  // f32, bf16 or f64; bf16 only travels, it is not summed
  int owner = 0;
};

/// What exchanges have cost this rank since the start, in seconds of wall-clock time and bytes.
struct CommCosts {
  double busy = 0;     // exchanges under way, waiting for slower ranks included
  double exposed = 0;  // of these, while finish() or a host-side call made the computation wait
  int64_t sent = 0;    // bytes that this rank sent to others

  double hidden() const { return busy - exposed; }
};

class Comm {
 public:
  Comm() = default;
  Comm(const Comm&) = delete;
  Comm& operator=(const Comm&) = delete;
  virtual ~Comm() = default;

  int rank() const { return rank_; }
  int size() const { return size_; }
  bool alone() const { return size_ == 1; }
  /// "1 process", "4 ranks over MPI", "8 ranks over NCCL"
  virtual const char* name() const { return "1 process"; }

  /// Takes the memory that exchanges of up to `bytes` in all need, so that no step allocates.
  virtual void reserve(int64_t bytes) { (void)bytes; }

  /// An exchange that was started: 0, 1, 2, ...
  using Ticket = int64_t;
  virtual Ticket start_sum(std::span<const Tensor> tensors);
  virtual Ticket start_reduce_scatter(std::span<const Part> parts);
  virtual Ticket start_all_gather(std::span<const Part> parts);
  virtual Ticket start_broadcast(const Tensor& tensor, int root);
  /// Work enqueued on ctx from now on comes after the exchange. Any order; a ticket twice does no harm. An
  /// exchange that cannot end because another rank failed is a RunError that says which rank.
  virtual void finish(Ticket ticket) { (void)ticket; }
  /// False when finish() waits on the host, so that a step with exchanges cannot be a CUDA graph. Else it can
  /// when it finishes all that it starts, and nothing that was started before.
  virtual bool capturable() const { return true; }

  /// Sums numbers in host memory over all ranks, waiting: for what happens once in a while.
  virtual void sum(std::span<double> values) { (void)values; }
  /// Waits until all ranks are here.
  void barrier() {
    double nothing = 0;
    sum({&nothing, 1});
  }

  virtual CommCosts costs() const { return {}; }

 protected:
  Comm(int rank, int size) : rank_(rank), size_(size) {}

 private:
  int rank_ = 0, size_ = 1;
};
