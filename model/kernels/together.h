// What the ranks of a job do at one moment and must agree on: a text that one of them knows, and whether all
// of them could do their share. For what happens once in a while: every call waits for all ranks.
#pragma once

#include <exception>
#include <string>

#include "error.h"
#include "model/kernels/comm.h"

/// A failure of one rank that all of them throw at the same moment: "rank 2: cannot write, ...".
struct SharedFailure : RunError {
  using RunError::RunError;
};

/// The root's text, on all ranks; what the others pass is ignored.
std::string broadcast_text(Comm& comm, const std::string& text, int root = 0);

/// Every rank says how its share ended, "" for well. SharedFailure on all ranks when one did not say "": the
/// text of the lowest such rank.
void agree(Comm& comm, const std::string& failure);

/// Does `work()`, this rank's share, which must not wait for other ranks; returns when all have done theirs.
/// What one rank throws, all throw as a SharedFailure; a single process throws it as it is.
template <typename Work>
void together(Comm& comm, Work&& work) {
  if (comm.alone()) return work();
  std::string failure;
  try {
    work();
  } catch (const SharedFailure&) {
    throw;  // the others throw it, too
  } catch (const std::exception& error) {
    failure = *error.what() != '\0' ? error.what() : "failed without saying why";
  }
  agree(comm, failure);
}
