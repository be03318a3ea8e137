#!/bin/sh
# tests/test_gpu_check.sh: dev/gpu_check goes on behind tests that crash, hang or take the GPU from their process, and says of
# each what became of it. The test program is a stand-in that does all of this.
set -eu
command -v python3 >/dev/null || { echo 'python3 is not installed'; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/tests" <<'END'
#!/usr/bin/env python3
import os
import sys
import time

NAMES = ["passes", "fails/x=-1,y", "crashes", "skips", "hangs", "loses", "passes_too", "last"]
if "--gtest_list_tests" in sys.argv:
    print("Running main() from somewhere.cc\nSuite.")
    print("".join(f"  {name}  # GetParam() = 1\n" for name in NAMES), end="")
    sys.exit()
flag = next(word for word in sys.argv if word.startswith("--gtest_flagfile="))
wanted = open(flag.split("=", 1)[1]).read().strip().removeprefix("--gtest_filter=").split(":")
lost = False
for name in NAMES:
    if f"Suite.{name}".replace("-", "?") not in wanted:
        continue
    print(f"[ RUN      ] Suite.{name}", flush=True)
    if name == "crashes":
        os._exit(3)
    if name == "hangs":
        time.sleep(60)
    if name == "loses":
        lost = True
    if lost:
        print("what(): an illegal memory access was encountered", flush=True)
    bad = lost or name.startswith("fails")
    if bad:
        print("it is wrong", flush=True)
    word = "[  FAILED  ]" if bad else "[  SKIPPED ]" if name == "skips" else "[       OK ]"
    print(f"{word} Suite.{name}{', where GetParam() = 1' if bad else ''} (0 ms)", flush=True)
print("[  FAILED  ] 1 test, listed below:\n[  FAILED  ] Suite.fails/x=-1,y", flush=True)
END
chmod +x "$work/tests"
cat >"$work/check.py" <<'END'
import os
import sys
import time

sys.path.insert(0, "dev/gpu_check")
import suites

work = sys.argv[1]


def run(seconds):
    return suites.run(f"{work}/tests", "*", f"{work}/log", dict(os.environ), time.monotonic() + seconds, patience=5)


done = run(30)
assert done.passed == ["Suite.passes", "Suite.passes_too", "Suite.last"], done.passed
assert done.skipped == ["Suite.skips"] and done.left == [], (done.skipped, done.left)
said = {"fails/x=-1,y": "it is wrong", "crashes": "status 3", "hangs": "without a word", "loses": "illegal memory access"}
assert list(done.failed) == [f"Suite.{name}" for name in said], done.failed
for name, words in said.items():
    assert words in done.failed[f"Suite.{name}"], (name, done.failed)
assert run(0).left[0] == "Suite.passes"  # no time: nothing ran, and that is known
END
python3 -B "$work/check.py" "$work"
