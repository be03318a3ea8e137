#!/bin/sh
# dev/install.sh PACKAGE...: installs the Debian or Ubuntu packages among these that are missing, naming them first.
# As root, or through sudo. Where that cannot be done it says which packages are missing and how to get them.
set -eu

missing=
for package in "$@"; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

by_hand="apt-get install$missing"
give_up() {
  echo "dev/install.sh: error: $1, missing packages:$missing, get them with: $by_hand" >&2
  exit 1
}
command -v apt-get >/dev/null 2>&1 || give_up "this is not a Debian or Ubuntu machine"
sudo=
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null 2>&1 || give_up "installing needs root or sudo"
  sudo=sudo
fi

echo "installing:$missing"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
install() {
  # shellcheck disable=SC2086  # a list of words
  DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -q --no-install-recommends $missing >"$log" 2>&1
}
# The package lists may be absent or old: fetch them only when the first try fails.
if ! install; then
  $sudo apt-get update -q >"$log" 2>&1 || { tail -n 5 "$log" >&2; give_up "the package lists cannot be fetched"; }
  install || { tail -n 5 "$log" >&2; give_up "apt-get failed"; }
fi
