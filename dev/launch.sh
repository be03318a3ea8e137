# dev/launch.sh: what the scripts that start several ranks share; to be sourced. They print the exact command and run it, or
# with --dry-run first print it only. TRAIN_GPT names the program, ./train_gpt unless set; it must be there on every machine,
# as must the data and --out, which all ranks share.
program=${TRAIN_GPT:-./train_gpt}
script=$(basename "$0")
dry_run=no

# fail WHAT, WHERE, WHAT TO DO
fail() {
  echo "$script: error: $1" >&2
  exit 2
}
usage() {
  echo "usage: $1" >&2
  exit 2
}
# is_count TEXT: a whole number above 0
is_count() {
  case $1 in
    '' | *[!0-9]* | 0*) return 1 ;;
  esac
}
check_program() {
  [ -x "$program" ] || fail "no program to start, $program, build it with make, or set TRAIN_GPT"
}
# check_command NAME PACKAGE
check_command() {
  [ "$dry_run" = yes ] || command -v "$1" >/dev/null 2>&1 || fail "it is not installed, $1, get it with: $2"
}
# The command as it could be typed, and then the command.
run() {
  line=
  for word; do
    case $word in
      *[!A-Za-z0-9_./:=,@%+-]* | '') line="$line '$(printf %s "$word" | sed "s/'/'\\\\''/g")'" ;;
      *) line="$line $word" ;;
    esac
  done
  echo "${line# }"
  [ "$dry_run" = yes ] || exec "$@"
}
