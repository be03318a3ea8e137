// Texts as documents: where they begin and end, and which of them are for validation. Rules: prepare.h.
#pragma once

#include <string_view>
#include <vector>

#include "data/tokenizer.h"
#include "files.h"

/// A piece of a document, in a mapped file.
struct DocumentPiece {
  std::string_view text;
  const MappedFile* file;
  bool starts_document;  // an end-of-text id goes before it
};

/// Appends the documents of a file. Blank ones are left out: two separators in a row, or one at the end.
void split_documents(const MappedFile& file, std::vector<DocumentPiece>& documents);
/// Moves documents (or the end of the only one) from the end of `train` to the result, in their order, until
/// the result has at least `fraction` of the bytes. RunError when one byte is all there is.
std::vector<DocumentPiece> take_validation(std::vector<DocumentPiece>& train, double fraction,
                                           const Tokenizer& tokenizer);
