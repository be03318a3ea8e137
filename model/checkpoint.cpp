#include "model/checkpoint.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <memory>

#include <fmt/format.h>

#include "error.h"
#include "json_text.h"
#include "model/gpt2_config.h"
#include "model/kernels/together.h"

namespace fs = std::filesystem;
using Json = nlohmann::json;

namespace {

constexpr const char* kModel = "model.safetensors";
constexpr const char* kConfig = "config.json";
constexpr const char* kOptimizer = "optimizer.safetensors";
constexpr const char* kState = "state.json";
constexpr const char* kTemporary = ".tmp";
constexpr const char* kHead = "lm_head.weight";
constexpr const char* kPrefix = "transformer.";

// The step of "step-00000500", or -1 for any other name.
int64_t step_of(std::string_view name) {
  constexpr std::string_view kStep = "step-";
  if (!name.starts_with(kStep) || name.size() < kStep.size() + 8) return -1;
  name.remove_prefix(kStep.size());
  int64_t step = -1;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), step);
  return error == std::errc() && end == name.data() + name.size() && name[0] != '-' ? step : -1;
}

std::string folder_of_run(const std::string& out) {
  return out + "/checkpoints";
}

// Checkpoint folders of a run by step, newest first.
std::vector<std::pair<int64_t, std::string>> list_checkpoints(const std::string& out) {
  std::vector<std::pair<int64_t, std::string>> found;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder_of_run(out), error)) {
    const int64_t step = step_of(entry.path().filename().string());
    if (step >= 0) found.emplace_back(step, entry.path().string());
  }
  std::sort(found.rbegin(), found.rend());
  return found;
}

// Removes what an interrupted save or removal left: only folders whose name this file makes.
void remove_stale(const std::string& folder) {
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename();
    const size_t stem = name.size() - std::min(name.size(), std::strlen(kTemporary));
    if (name.substr(stem) == kTemporary && step_of(std::string_view(name).substr(0, stem)) >= 0)
      fs::remove_all(entry);
  }
}

// A folder never disappears file by file under its final name: a crash in between would leave a damaged one.
void remove_checkpoint(const std::string& folder) {
  const std::string condemned = folder + kTemporary;
  fs::rename(folder, condemned);
  fs::remove_all(condemned);
}

std::string hash_text(const std::string& path) {
  return fmt::format("{:016x}", hash_file(path));
}

// Throws when a file is not, bit for bit, what state.json says was saved. Folders of other programs have no
// hashes.
void verify(const std::string& folder, const char* name) {
  std::error_code ignored;
  if (!fs::exists(folder + "/" + kState, ignored)) return;
  const Json state = load_state(folder);
  const auto hashes = state.find("hashes");
  if (hashes == state.end() || !hashes->is_object() || !hashes->contains(name)) return;
  const std::string path = folder + "/" + name;
  if ((*hashes)[name] != hash_text(path))
    throw RunError(fmt::format("its bytes are not those that were saved, {}, use another checkpoint", path));
}

// What rank 0 does for all of them.
template <typename Work>
void by_rank_0(Comm& comm, Work&& work) {
  together(comm, [&] {
    if (comm.rank() != 0) return;
    try {
      work();
    } catch (const fs::filesystem_error& error) {
      throw RunError(fmt::format("cannot write the checkpoint ({}), {}, check the folder and its permissions",
                                 error.code().message(), error.path1().string()));
    }
  });
}

bool is_tied(const ParameterTable& table) {
  return std::none_of(table.begin(), table.end(), [](const Parameter& p) { return p.role == Role::head; });
}

// transformers loads a model without its head by bare names, and one with a head by full names alone.
std::string name_on_disk(const Parameter& p, bool tied) {
  return tied || p.role == Role::head ? p.name : kPrefix + p.name;
}

// The parameters as tensors, those of other ranks without data.
std::vector<NamedTensor> model_pieces(const CheckpointToSave& what, int rank) {
  const ParameterTable& table = what.parameters;
  const bool tied = is_tied(table);
  std::vector<NamedTensor> pieces;
  size_t parameters = 0;
  const auto add = [&](const Parameter& p, int64_t first, int64_t rows, int owner) {
    NamedTensor piece{name_on_disk(p, tied), p.value, p.transposed_on_disk,
                      table.context(),       first,   p.shape[0]};
    piece.value.shape = p.is_matrix() ? Shape{rows, p.shape[1]} : Shape{rows};
    piece.value.data = owner == rank && !p.masters.empty() ? p.master(first, rows).data : nullptr;
    parameters += pieces.empty() || pieces.back().name != piece.name ? 1 : 0;
    pieces.push_back(piece);
  };
  for (const OwnedRows& o : what.owned) add(table.rows().at(o.parameter), o.first, o.rows, o.owner);
  if (what.owned.empty())
    for (const Parameter& p : table) add(p, 0, p.shape[0], /*owner=*/0);
  expect(parameters == table.rows().size(), "save_checkpoint: a parameter has no owner");
  return pieces;
}

// Everything in the folder; all ranks.
void write_files(const CheckpointToSave& what, const std::string& folder, Comm& comm) {
  const std::map<std::string, std::string> metadata{{"format", "pt"}};
  const auto write = [&](const char* name, std::span<const NamedTensor> tensors) {
    write_safetensors(folder + "/" + name, tensors, metadata, Existing::refuse, comm);
  };
  std::vector<NamedTensor> model;
  together(comm, [&] { model = model_pieces(what, comm.rank()); });
  write(kModel, model);
  write(kOptimizer, what.optimizer);
  by_rank_0(comm, [&] {
    write_text(folder + "/" + kConfig, gpt2_config_json(what.config, what.end_of_text), Existing::refuse);
    Json state = what.state;
    for (const char* name : {kModel, kOptimizer}) state["hashes"][name] = hash_text(folder + "/" + name);
    write_text(folder + "/" + kState, json_text(state, 1) + "\n", Existing::refuse);
    if (!what.tokenizer.empty()) write_text(folder + "/tokenizer.json", what.tokenizer, Existing::refuse);
    sync_folder(folder);
  });
}

// Why a checkpoint cannot be used, or "" when it can: reads everything once.
std::string flaw(const std::string& folder) {
  try {
    load_config(folder);
    load_state(folder);
    for (const char* name : {kModel, kOptimizer}) {
      const SafetensorsReader header_is_sound(folder + "/" + name);
      verify(folder, name);
    }
    return "";
  } catch (const RunError& error) {
    return error.what();
  }
}

// The .safetensors file that `path` (a folder or the file) means.
std::string model_file(const std::string& path) {
  std::error_code ignored;
  return fs::is_directory(path, ignored) ? path + "/" + kModel : path;
}

std::string config_file(const std::string& path) {
  return (fs::path(model_file(path)).parent_path() / kConfig).string();
}

}  // namespace

std::string save_checkpoint(const CheckpointToSave& what) {
  expect(what.step >= 0, "save_checkpoint: negative step");
  Comm& comm = *what.parameters.context()->comm;
  const std::string parent = folder_of_run(what.out);
  std::string folder = fmt::format("{}/step-{:08}", parent, what.step);
  const std::string temporary = folder + kTemporary;
  std::unique_ptr<FolderLock> lock;
  bool begun = false;  // by rank 0, and not by another process
  const auto discard = [&] {
    std::error_code ignored;
    if (begun) fs::remove_all(temporary, ignored);
  };
  try {
    by_rank_0(comm, [&] {
      make_folder(parent);
      sync_folder(what.out);
      lock = std::make_unique<FolderLock>(parent);
      remove_stale(parent);
      if (what.existing == Existing::refuse && fs::exists(folder))
        throw RunError(fmt::format(
            "a checkpoint of this step exists and nothing is overwritten, {}, choose another --out", folder));
      begun = true;
      make_folder(temporary);
    });
    write_files(what, temporary, comm);
    by_rank_0(comm, [&] { rename_folder(temporary, folder, what.existing); });
  } catch (const SharedFailure&) {
    discard();
    comm.barrier();  // the end of another rank may be the end of this one
    throw;
  } catch (...) {
    discard();
    throw;
  }
  by_rank_0(comm, [&] {
    fs::remove_all(temporary);  // the replaced one, if there was one
    // The new one is complete and on disk: only now may older ones go.
    int64_t kept = 0;
    for (const auto& [step, path] : list_checkpoints(what.out))
      if (what.keep > 0 && step <= what.step && ++kept > what.keep) remove_checkpoint(path);
  });
  return folder;
}

std::optional<std::string> newest_checkpoint(const std::string& out, std::vector<std::string>* passed_over) {
  for (const auto& [step, folder] : list_checkpoints(out)) {
    const std::string why_not = flaw(folder);
    if (why_not.empty()) return folder;
    if (passed_over) passed_over->push_back(why_not);
  }
  return std::nullopt;
}

std::optional<std::string> newest_checkpoint(Comm& comm, const std::string& out,
                                             std::vector<std::string>* passed_over) {
  std::string found, hash;
  together(comm, [&] {
    if (comm.rank() != 0) return;
    found = newest_checkpoint(out, passed_over).value_or("");
    if (!found.empty()) hash = hash_text(found + "/" + kState);
  });
  found = broadcast_text(comm, found), hash = broadcast_text(comm, hash);
  if (found.empty()) return std::nullopt;
  together(comm, [&] {
    // It has the hashes of the other files.
    const std::string state = found + "/" + kState;
    std::error_code ignored;
    if (!fs::exists(state, ignored) || hash_text(state) != hash)
      throw RunError(
          fmt::format("this rank does not see the checkpoint that rank 0 sees, {}, use a folder "
                      "that all ranks share",
                      found));
  });
  return found;
}

void discard_unfinished(Comm& comm, const std::string& out) {
  by_rank_0(comm, [&] {
    const std::string parent = folder_of_run(out);
    if (!fs::exists(parent)) return;
    const FolderLock lock(parent);
    remove_stale(parent);
  });
}

void expect_shared(Comm& comm, const std::string& folder) {
  if (comm.alone()) return;
  const std::string path = folder + "/shared", mark = broadcast_text(comm, new_mark());
  std::unique_ptr<FileWriter> file;
  by_rank_0(comm, [&] {
    file = std::make_unique<FileWriter>(path, Existing::replace);
    file->write(mark.data(), static_cast<int64_t>(mark.size()));
    file->sync();
  });
  together(comm, [&] {
    if (!file) FileShare(path, mark).finish();
  });
}

int64_t checkpoint_step(const std::string& folder) {
  fs::path path(folder);
  if (path.filename().empty()) path = path.parent_path();  // "step-00000500/"
  const int64_t step = step_of(path.filename().string());
  if (step < 0)
    throw RunError(fmt::format("the folder is not named like a checkpoint, {}, name one step-...", folder));
  return step;
}

bool has_config(const std::string& path) {
  std::error_code ignored;
  return fs::exists(config_file(path), ignored);
}

ModelConfig load_config(const std::string& path) {
  const std::string file = config_file(path);
  return parse_gpt2_config(read_text(file, "model config"), file);
}

namespace {

// Buffers of older GPT-2 files, no weights: the causal mask and the value it puts in.
bool is_mask(const std::string& name, const ParameterTable& parameters) {
  for (const char* suffix : {".attn.bias", ".attn.masked_bias"}) {
    if (!name.ends_with(suffix)) continue;
    const std::string block = name.substr(0, name.size() - std::strlen(suffix));
    for (const Parameter& p : parameters)
      if (p.name == block + ".ln_1.weight") return true;
  }
  return false;
}

// lm_head.weight may be there when it repeats the token embedding, as a tied model saved it.
void check_head(const SafetensorsReader& file, const SafetensorsReader::Entry& head,
                const std::string& embedding) {
  const auto* wte = file.find(embedding);
  const bool tied =
      wte && wte->dtype == head.dtype && wte->shape == head.shape && file.same_values(*wte, head);
  if (!tied)
    throw RunError(fmt::format(
        "tensor 'lm_head.weight' differs from the token embedding, {}, use a model with a tied head",
        file.path()));
}

}  // namespace

void load_parameters(const std::string& path, ParameterTable& parameters) {
  const SafetensorsReader file(model_file(path));
  if (parameters.context()->comm->rank() == 0 && fs::is_directory(path)) verify(path, kModel);
  const std::string prefix = file.find(std::string(kPrefix) + "wte.weight") ? kPrefix : "";
  const bool tied = is_tied(parameters);
  for (const SafetensorsReader::Entry& entry : file.entries()) {
    if (entry.name == kHead) {
      if (tied) check_head(file, entry, prefix + "wte.weight");
      continue;
    }
    const std::string name = entry.name.starts_with(prefix) ? entry.name.substr(prefix.size()) : "";
    const bool known =
        std::any_of(parameters.begin(), parameters.end(), [&](const Parameter& p) { return p.name == name; });
    if (!known && !is_mask(name, parameters))
      throw RunError(
          fmt::format("tensor {} is not part of this model, {}, use a file of the same model and size",
                      in_quotes(entry.name), file.path()));
  }
  const int64_t positions_in_file = has_config(path) ? load_config(path).positions : 0;
  for (Parameter& p : parameters) {
    const std::string name = p.name != kHead    ? prefix + p.name
                             : file.find(kHead) ? kHead
                                                : prefix + "wte.weight";
    const auto* entry = file.find(name);
    const bool longer = p.role == Role::position && entry && entry->shape.size() == 2 &&
                        entry->shape[0] == positions_in_file && positions_in_file > p.shape[0];
    parameters.set(p, [&](float* whole) {
      const NamedTensor to{p.name, Tensor(whole, p.shape), p.transposed_on_disk};
      if (longer)
        file.read_first_rows(name, to);
      else
        file.read(name, to);
    });
  }
}

void load_optimizer(const std::string& folder, std::span<const NamedTensor> tensors) {
  const SafetensorsReader file(folder + "/" + kOptimizer);
  for (const SafetensorsReader::Entry& entry : file.entries()) {
    const bool known = std::any_of(tensors.begin(), tensors.end(),
                                   [&](const NamedTensor& t) { return t.name == entry.name; });
    if (!known)
      throw RunError(
          fmt::format("tensor {} is not part of this optimizer, {}, resume with the rules of that run",
                      in_quotes(entry.name), file.path()));
  }
  for (const NamedTensor& tensor : tensors) file.read(tensor.name, tensor);
}

Json load_state(const std::string& folder) {
  const std::string path = folder + "/" + kState;
  Json json = parse_json(read_text(path, "training state"));
  if (!json.is_object())
    throw RunError(fmt::format("the training state is not a JSON object, {}, use another checkpoint", path));
  return json;
}
