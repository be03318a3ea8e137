// How gradients reach the owners of their pieces, and new weights everybody else, while the model computes.
//
//   backward of layer l-1   while   gradients of layer l  are summed onto their owners      (reduce_scatter)
//   update of the matrices  while   new embeddings, positions and vectors travel           (all_gather)
//   next forward of layer l while   the weights of layers l+1, l+2, ... travel
//
// One exchange carries all pieces of a layer's matrices, whoever owns them; what lies outside of the layers
// (embeddings, positions) goes in one, and all vectors together in one. A layer's exchange may have few
// owners, because matrices are owned whole: over all layers every rank sends and receives
//
//   (N-1)/N of the gradients, f32, and (N-1)/N of the weights, as the model reads them (bf16 or f32)
//
// for a balanced split (owners.h). All ranks start the same exchanges in the same order, also those that own
// nothing in them. With one process nothing happens at all.
//
//   exchange.allocate();   model.watch(&exchange);   optimizer.on_moved(exchange.send_early);
//   each step:  passes of the model   ->  gradients_ready(layer), weights_needed(layer)
//               exchange.finish_gradients();      before the optimizer's step
//               exchange.send_early(parameters);  as soon as the new values of these are final
//               exchange.send_rest();             after the update
//   before anything else reads weights:   exchange.finish_weights();
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "model/gpt.h"
#include "model/parameters.h"
#include "optim/owners.h"

class Exchange final : public LayerWatcher {
 public:
  /// `table` and `owners`, whose parameters are the table's rows in order, must outlive this.
  Exchange(Context& ctx, ParameterTable& table, const Owners& owners);
  /// Reserves what the largest exchange takes. Call when the table has its memory.
  void allocate();

  void gradients_ready(int layer) override;
  void weights_needed(int layer) override;

  /// Afterwards Parameter::grad is the sum over all ranks, on the owner of each piece.
  void finish_gradients();
  /// The new values of these parameters (indices into the table) are final on their owners: starts sending
  /// what lies outside of the layers, and vectors. The layers' matrices wait for send_rest(): exchanges go
  /// one after the other, a pass needs whole layers, and sent as they come, shape by shape, the first layer
  /// would wait for nearly all (dev/many_gpus.md).
  void send_early(std::span<const size_t> parameters);
  /// Starts sending all that was not sent since the last call of this, layer by layer.
  void send_rest();
  /// Afterwards all weights are everywhere what their owners made them.
  void finish_weights();

  /// For telemetry, waiting: what the owners have in Parameter::grad (sums, or directions after a step), on
  /// every rank.
  void gather_gradients();
  /// The same for other tensors of the parameters' shapes, one each: the owners' rows, on every rank.
  void gather(std::span<const Tensor> whole);

  /// Bytes that this rank sends in one step by the formula above: to be held against Comm::costs().
  int64_t bytes_per_step() const;

 private:
  enum class What : uint8_t { gradients, weights };
  /// The pieces of some parameters, to be exchanged together.
  std::vector<Part> parts(std::span<const size_t> parameters, What what) const;
  void add_parts(std::vector<Part>& to, size_t parameter, const Tensor& tensor) const;
  void send(std::span<const size_t> parameters);
  /// The layer whose pass needs the weights first.
  int layer_of(size_t parameter) const;
  struct Pending {
    int layer;  // who waits for it
    Comm::Ticket ticket;
  };
  bool alone() const { return ctx_.comm->alone(); }

  Context& ctx_;
  ParameterTable& table_;
  const Owners& owners_;
  std::vector<std::vector<size_t>> matrices_;  // of each layer; the last entry: outside
  std::vector<size_t> vectors_, all_;
  std::vector<Comm::Ticket> gradients_;  // on their way
  std::vector<Pending> weights_;         // on their way
  std::vector<bool> sent_;               // of each parameter, since the last send_rest()
};
