#!/usr/bin/env bash
# Compares a GPT-2 checkpoint and the logits that train_gpt computed from it with Hugging Face's transformers.
#
#   tests/test_transformers.sh CHECKPOINT_DIR LOGITS_JSON      (the formats are in tests/test_transformers.py)
#   tests/test_transformers.sh --install                       only prepares the environment
#   TRAIN_GPT=PROGRAM tests/test_transformers.sh               trains small models first, one tied, one not
#
# The environment is a virtual one, build/venv-transformers, made once: Debian's python3-torch (140 MB of packages,
# installed with apt when missing) below, a pinned transformers from PyPI (160 MB on disk) above. Nothing in it trains
# anything. TRANSFORMERS_PYTHON=/path/to/python uses that Python, as it is, instead.
# Exit status: 0 agreement, 1 a difference, 2 bad usage, 77 skipped (a line SKIPPED says what could not be had).
set -u

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$(dirname "$here")/build/venv-transformers
version=4.46.3 # the last series that takes Debian 12's torch 1.13

if [ $# -eq 0 ] && [ -n "${TRAIN_GPT:-}" ]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  # An odd vocabulary (257), steps that leave no weight at its first value, a row shorter than the positions.
  cat README.md CONTRIBUTING.md >"$work/text" &&
    "$TRAIN_GPT" prepare --text "$work/text" --out "$work/data" --val-fraction 0.1 || exit 1
  for tied in 1 0; do
    run=$work/tied-$tied
    "$TRAIN_GPT" train --train "$work/data/train_*.bin" --val "$work/data/val_*.bin" --out "$run" \
      --model gpt2-nano:tied=$tied --batch-size 4 --seq-len 64 --steps 20 &&
      "$TRAIN_GPT" evaluate --model "$run" --data "$work/data/val_*.bin" --seq-len 37 --logits "$run/logits.json" ||
      exit 1
    "${BASH_SOURCE[0]}" "$run"/checkpoints/step-* "$run/logits.json" || exit
  done
  exit 0
fi
if [ $# -ne 2 ] && [ "$*" != --install ]; then
  sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi

skip() {
  echo "SKIPPED: $1"
  exit 77
}

# An environment is whole when its own Python imports everything; a half-made one from an interrupted run is not.
whole() { [ -x "$venv/bin/python" ] && "$venv/bin/python" -c \
  "import torch, transformers; assert transformers.__version__ == '$version'" 2>/dev/null; }

# Debian's packages below the virtual environment: torch 1.13 for the processor, and venv itself.
install_debian_packages() {
  if /usr/bin/python3 -c 'import torch, ensurepip' 2>/dev/null; then return 0; fi
  command -v apt-get >/dev/null || skip "no torch for /usr/bin/python3 and no apt-get to install python3-torch with"
  local sudo=""
  if [ "$(id -u)" -ne 0 ]; then
    sudo -n true 2>/dev/null ||
      skip "no torch for /usr/bin/python3; install it with: sudo apt-get install python3-torch python3-venv"
    sudo="sudo -n"
  fi
  echo "installing python3-torch and python3-venv with apt (140 MB, once)"
  local install=($sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends
    -o DPkg::Lock::Timeout=120 python3-torch python3-venv)
  "${install[@]}" >/dev/null 2>&1 || { $sudo apt-get update -qq && "${install[@]}"; } >/dev/null 2>&1 ||
    skip "apt could not install python3-torch and python3-venv"
  /usr/bin/python3 -c 'import torch, ensurepip' 2>/dev/null ||
    skip "/usr/bin/python3 cannot import torch although python3-torch is installed"
}

make_environment() {
  whole && return 0
  install_debian_packages
  echo "making $venv with transformers $version from PyPI (once)"
  rm -rf "$venv"
  mkdir -p "$(dirname "$venv")"
  /usr/bin/python3 -m venv --system-site-packages "$venv" || skip "cannot make a virtual environment in $venv"
  "$venv/bin/python" -m pip install -q --disable-pip-version-check --no-cache-dir --retries 2 --timeout 60 \
    "transformers==$version" || skip "pip could not install transformers $version from PyPI"
  whole || skip "the new environment in $venv cannot import torch and transformers $version"
}

python=${TRANSFORMERS_PYTHON:-}
if [ -z "$python" ]; then
  make_environment
  python=$venv/bin/python
fi
[ "$1" = --install ] && exit 0
exec "$python" "$here/test_transformers.py" "$1" "$2"
