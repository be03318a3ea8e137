// Checkpoints: OUT/checkpoints/step-00000500/ holds
//   model.safetensors, config.json   the model, for GPT-2 in Hugging Face's names and layout: linear weights
//                                    (in, out); no lm_head when it is tied, else all names but that begin
//                                    with "transformer.". transformers' GPT2LMHeadModel loads it
//   optimizer.safetensors            the optimizer's tensors, by name
//   state.json                       step, data position and what else the caller wants back
//   tokenizer.json                   when known
// The folder is written as step-00000500.tmp, every file and the folder are synced, then it is renamed: what
// has the name is complete. A crash at any moment leaves the older checkpoints and at most one .tmp, removed
// by the next save or resume.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "model/parameters.h"
#include "model/safetensors.h"

struct CheckpointToSave {
  std::string out;  // OUT, the folder of the run
  int64_t step;     // updates done
  const ModelConfig& config;
  const ParameterTable& parameters;
  std::span<const OwnedRows> owned = {};  // all rows of all parameters, in order; none: rank 0 writes all
  std::span<const NamedTensor> optimizer;
  const nlohmann::json& state;           // state.json
  std::string tokenizer = {};            // text of tokenizer.json; "" for none
  int32_t end_of_text = -1;              // bos and eos id in config.json; -1 for V - 1
  int64_t keep = 0;                      // remove older ones beyond this many; 0 keeps all
  Existing existing = Existing::refuse;  // when this step has a checkpoint already
};

/// Writes one; returns its folder. RunError on a full disk or a taken name; then nothing older has changed.
/// With several ranks (those of the parameters' context) all call it with equal arguments but for the data of
/// tensors. Each writes what it owns, rank 0 does everything else; all return when the checkpoint has its
/// name, or throw the same error when the unfinished one is gone.
std::string save_checkpoint(const CheckpointToSave& what);

/// The newest complete checkpoint under OUT, or nothing. Folders that are incomplete or damaged are passed
/// over; `passed_over`, when given, receives one line about each.
std::optional<std::string> newest_checkpoint(const std::string& out,
                                             std::vector<std::string>* passed_over = nullptr);
/// The same for all ranks: rank 0 looks, and alone fills `passed_over`; all return what it found. What goes
/// wrong on one rank, all throw; among these, a rank that sees other files in that folder.
std::optional<std::string> newest_checkpoint(Comm& comm, const std::string& out,
                                             std::vector<std::string>* passed_over = nullptr);
/// Removes what a crash in the middle of a save under OUT left; all ranks, for the start of a resumed run.
/// RunError when another process is saving there.
void discard_unfinished(Comm& comm, const std::string& out);
/// RunError on all ranks when one of them sees another folder under this name than rank 0 does: its share of
/// a checkpoint would be lost. For the start of a run; leaves nothing.
void expect_shared(Comm& comm, const std::string& folder);
/// The step of a checkpoint folder, from its name.
int64_t checkpoint_step(const std::string& folder);

/// `path` below is a folder with model.safetensors, or a .safetensors file; config.json is looked for beside
/// it.
bool has_config(const std::string& path);
/// Sizes from config.json. RunError names the file and the field: not GPT-2, another activation, ...
ModelConfig load_config(const std::string& path);
/// Fills the values of `parameters` from GPT-2 weights in Hugging Face's layout. Accepts a "transformer."
/// prefix (lm_head.weight has none), a tied lm_head.weight equal to wte.weight, and the mask buffers
/// attn.bias and attn.masked_bias. A head of its own begins as the embedding where the file, of a tied model,
/// has none. When config.json says that the file has more positions than the table, the first ones are taken.
/// Every missing, additional or mis-shaped tensor is a RunError that names file and tensor. Ranks read for
/// themselves, here and below, and rank 0 alone looks for damage: together() makes what one throws known to
/// all.
void load_parameters(const std::string& path, ParameterTable& parameters);
/// Fills tensors that the caller laid out (names, shapes) from optimizer.safetensors; the sets must be equal.
/// Pieces without data belong to other ranks and are left out.
void load_optimizer(const std::string& folder, std::span<const NamedTensor> tensors);
/// state.json as an object.
nlohmann::json load_state(const std::string& folder);
