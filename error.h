// The two kinds of failure that a user can see. Everything else is a bug and ends as std::logic_error.
#pragma once

#include <stdexcept>
#include <string>

/// Bad usage: a flag, a key, a value. Exit status 2. Message: "<what>, <which option>, <what would be
/// legal>".
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A failure at run time: a file, memory, a non-finite number. Exit status 1. Message: "<what>, <which file>,
/// <what to do>".
struct RunError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
