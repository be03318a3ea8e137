#!/bin/sh
# data/kjv.sh OUT.txt: the King James Bible as a text, from the program `bible` (Debian and Ubuntu: package bible-kjv).
# One verse per line without its reference; a line <|endoftext|> between books. 31,102 verses, 66 books, 4.1 MB.
set -eu

if [ $# -ne 1 ]; then
  echo "usage: data/kjv.sh OUT.txt" >&2
  exit 2
fi
if ! command -v bible >/dev/null 2>&1; then
  echo "data/kjv.sh: error: the program 'bible' is missing, install it with: apt-get install bible-kjv" >&2
  exit 1
fi

out=$1
part=$out.tmp.$$
trap 'rm -f "$part" "$part.raw"' EXIT
trap 'exit 1' HUP INT TERM

bible -f 'gen1:1-rev22:21' </dev/null >"$part.raw"

# A line is "<book><chapter>:<verse> <text>"; the book's short name may begin with a digit ("1Sa3:4").
LC_ALL=C awk '
  !/^[0-9]?[A-Za-z]+[0-9]+:[0-9]+ ./ { bad = NR; exit 1 }
  {
    match($0, /^[0-9]?[A-Za-z]+/)
    book = substr($0, 1, RLENGTH)
    if (book != last) { if (books++) print "<|endoftext|>"; last = book }
    sub(/^[^ ]+ +/, "")
    print
    verses++
  }
  END {
    if (bad) printf "data/kjv.sh: error: line %d of the output of bible is not a verse\n", bad >"/dev/stderr"
    else if (verses != 31102 || books != 66)
      printf "data/kjv.sh: error: bible gave %d verses in %d books, not 31102 in 66\n", verses, books >"/dev/stderr"
    exit bad || verses != 31102 || books != 66
  }' "$part.raw" >"$part"

sync "$part" 2>/dev/null || true
mv -f "$part" "$out"
