#include "data/documents.h"

#include <algorithm>

#include <fmt/format.h>

#include "error.h"

namespace {

constexpr std::string_view kSeparator = "<|endoftext|>";

bool is_blank(std::string_view text) {
  return text.find_first_not_of(" \t\r\n") == std::string_view::npos;
}

// The next separator line: [begin, end) with the line breaks that belong to it; or the end of the text.
std::pair<size_t, size_t> next_separator(std::string_view text, size_t from) {
  for (size_t at = from; (at = text.find(kSeparator, at)) != std::string_view::npos;
       at += kSeparator.size()) {
    size_t begin = at, end = at + kSeparator.size();
    if (begin > 0 && text[begin - 1] != '\n') continue;  // not alone on its line
    if (text.substr(end, 1) == "\r") ++end;
    if (end < text.size() && text[end] != '\n') continue;
    end += end < text.size();
    begin -= begin > from;
    begin -= begin > from && text[begin - 1] == '\r';
    return {begin, end};
  }
  return {text.size(), text.size()};
}

// Where to cut a single document so that about `val_bytes` follow: after a line break near there, else where
// the tokenizer allows it.
size_t cut_inside(std::string_view text, double val_bytes, const Tokenizer& tokenizer) {
  const auto wanted = static_cast<size_t>(static_cast<double>(text.size()) - std::max(1.0, val_bytes));
  const size_t target = std::clamp<size_t>(wanted, 1, text.size() - 1);
  const size_t before = text.rfind('\n', target - 1);
  // Near: validation at most doubles, or stays below 1 KB and most of the text.
  const size_t most = std::max(2 * (text.size() - target), std::min<size_t>(text.size() / 4 * 3, 1024));
  if (before != std::string_view::npos && text.size() - (before + 1) <= most) return before + 1;
  const size_t cut = tokenizer.cut(text, target);
  return cut > 0 ? cut : target;
}

}  // namespace

void split_documents(const MappedFile& file, std::vector<DocumentPiece>& documents) {
  const std::string_view text = file.text();
  for (size_t from = 0; from < text.size();) {
    const auto [begin, end] = next_separator(text, from);
    const std::string_view document = text.substr(from, begin - from);
    if (!is_blank(document)) documents.push_back({document, &file, true});
    from = end;
  }
}

std::vector<DocumentPiece> take_validation(std::vector<DocumentPiece>& train, double fraction,
                                           const Tokenizer& tokenizer) {
  std::vector<DocumentPiece> val;
  if (fraction == 0) return val;
  double total = 0;
  for (const DocumentPiece& document : train) total += static_cast<double>(document.text.size());
  if (train.size() == 1) {
    DocumentPiece& only = train[0];
    if (only.text.size() < 2)
      throw RunError(
          fmt::format("one byte of text cannot be split into training and validation, {}, give more text or "
                      "--val-fraction 0",
                      only.file->path()));
    const size_t cut = cut_inside(only.text, fraction * total, tokenizer);
    val.push_back({only.text.substr(cut), only.file, true});
    only.text = only.text.substr(0, cut);
    return val;
  }
  for (double bytes = 0; train.size() > 1 && (val.empty() || bytes < fraction * total); train.pop_back()) {
    bytes += static_cast<double>(train.back().text.size());
    val.push_back(train.back());
  }
  std::reverse(val.begin(), val.end());
  return val;
}
