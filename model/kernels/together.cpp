#include "model/kernels/together.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include <fmt/format.h>

std::string broadcast_text(Comm& comm, const std::string& text, int root) {
  if (comm.alone()) return text;
  // Sums to which the others add zeros: four bytes in each number, which holds them exactly.
  const bool mine = comm.rank() == root;
  double length = mine ? static_cast<double>(text.size()) : 0;
  comm.sum({&length, 1});
  std::vector<uint32_t> words((static_cast<size_t>(length) + 3) / 4);
  if (mine && !words.empty()) std::memcpy(words.data(), text.data(), text.size());
  std::vector<double> numbers(words.begin(), words.end());
  if (!numbers.empty()) comm.sum(numbers);
  std::transform(numbers.begin(), numbers.end(), words.begin(),
                 [](double number) { return static_cast<uint32_t>(number); });
  return std::string(reinterpret_cast<const char*>(words.data()), static_cast<size_t>(length));
}

void agree(Comm& comm, const std::string& failure) {
  std::vector<double> failed(static_cast<size_t>(comm.size()));
  failed[static_cast<size_t>(comm.rank())] = failure.empty() ? 0 : 1;
  comm.sum(failed);
  const auto first = std::find_if(failed.begin(), failed.end(), [](double f) { return f != 0; });
  if (first == failed.end()) return;
  const int rank = static_cast<int>(first - failed.begin());
  const std::string text = broadcast_text(comm, failure, rank);
  throw SharedFailure(comm.alone() ? text : fmt::format("rank {}: {}", rank, text));
}
