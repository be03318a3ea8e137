// Which cases the harness runs: from the name of an operation and sizes on the command line to cases of
// tests/op_cases.h. A size text is what stands behind the slash of a case's name, so every case that any test
// or table prints can be run again: "matmul/M=7,N=33,K=65,TN,bias" is operation "matmul", sizes
// "M=7,N=33,K=65,TN,bias".
#pragma once

#include <string>
#include <vector>

#include "dev/harness/variants.h"

/// What an operation can be asked for.
struct OpHelp {
  std::string op;     // "gelu_backward"
  std::string sizes;  // "B,T,C"
  std::string words;  // "in_place": what may stand behind the sizes
};
std::vector<OpHelp> known_operations();

/// One case of exactly these sizes; with a candidate, the candidate runs in the door's place. Throws
/// std::runtime_error "<what>, <which>, <what to do>" when the operation or a size is unknown or missing.
OpCase make_case(const std::string& op, const std::string& sizes, const AnyOp* candidate = nullptr);

/// The cases to run. All of an operation's own sizes: that one case. Otherwise the operations of a training
/// step (only `op`, unless that is empty), its sizes B, T, C, NH, V, chunk changed as told.
std::vector<OpCase> choose_cases(const std::string& op, const std::string& sizes);

/// The cases whose names stand in a file, one a line; '#' begins a comment.
std::vector<OpCase> read_cases(const std::string& path);

/// The operation of a case: its name up to the slash.
std::string op_of(const OpCase& op_case);
