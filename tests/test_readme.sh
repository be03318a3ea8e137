#!/bin/sh
# tests/test_readme.sh: what the README tells a reader to type exists and works. TRAIN_GPT is the program.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() {
  echo "README: $1" >&2
  exit 1
}

# Every make target that is named exists.
for target in $(sed -n 's/.*`*make \([a-z-]*\).*/\1/p' README.md CONTRIBUTING.md | sort -u); do
  grep -q "^$target:" Makefile || fail "make $target is not in the Makefile"
done
# Every file or folder that is linked or drawn exists.
for file in $(sed -n 's/.*](\([^)#:]*\)).*/\1/p' README.md) $(sed -n 's/^ *\([a-z_]*\/\|[a-z_]*\.[a-z]*\) .*/\1/p' README.md); do
  [ -e "$file" ] || [ -e "model/$file" ] || fail "$file does not exist"
done

# The commands of "Train on your own text", with a short text and few steps, in an empty folder.
cat README.md CONTRIBUTING.md >"$work/notes.txt"
cp CONTRIBUTING.md "$work/more.txt"
cp dev/plot.sh "$work/"
sed -n '/^## Train on your own text/,/^```$/p' README.md | sed -n '/^```sh/,/^```$/p' | sed '/^```/d' >"$work/commands"
[ "$(grep -c '^./train_gpt' "$work/commands")" -ge 4 ] || fail "the commands of 'Train on your own text' are gone"
sed -i "s|^./train_gpt|$TRAIN_GPT|; s/--steps [0-9]*/--steps 3/; s/--seq-len [0-9]*/--seq-len 32/; s/\(generate.*\)/\1 --tokens 5/" \
  "$work/commands"
sed -i 's/ *#.*--tokens 5/ --tokens 5/; s/--tokens 5\( --tokens 5\)*/--tokens 5/' "$work/commands"
(cd "$work" && sh -eu commands) || fail "the commands of 'Train on your own text' fail"

# Every rule of the table is a rule.
for rule in $(sed -n 's/^| `\([a-z, `]*\)` |.*/\1/p' README.md | tr -d '`,'); do
  "$TRAIN_GPT" info --model gpt2-nano --hidden "$rule" >/dev/null || fail "rule $rule does not exist"
done
