#!/usr/bin/env python3
"""tests/lint.py FILES... -- FLAGS: clang-tidy over FILES; exit status 1 when it has anything to say.

clang-tidy goes through every header of a file again, which is nine tenths of its time. So files are linted in groups: a
generated file includes those of a group, and their headers are gone through once. Two files that declare the same name
outside of functions do not share a group: they would not compile together, or one would use what the other leaves unused. A
group that does not compile all the same is halved, down to single files, so that grouping changes the time and not the
result.
"""
import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import tempfile

GROUP = 12  # files; more would leave cores idle at the end

# The names that a line which is not inside a body declares: functions, types, constants, aliases, using and macros.
DECLARATION = re.compile(
    r"#define (\w+)|using (?:[\w:]+::)?(?!namespace)(\w+)|namespace (\w+) =|TEST(?:_F|_P)?\((\w+, *\w+)"
    r"|(?:template .*> *)?(?:struct|class|union|enum(?: class)?) (\w+)"
    r"|\w[\w:<>,&*\[\] ]*[ &*>](\w+) *[({=;\[]")


def names(path):
    found = set()
    for line in pathlib.Path(path).read_text().splitlines():
        if match := DECLARATION.match(line):
            found.add(next(name for name in match.groups() if name))
    return found - {"if", "for", "while", "return", "switch", "defined"}


def groups_of(files):
    groups = []  # (files, their names)
    for path in files:
        mine = names(path)
        for members, taken in groups:
            if len(members) < GROUP and not mine & taken:
                members.append(path)
                taken |= mine
                break
        else:
            groups.append(([path], mine))
    return sorted((members for members, _ in groups), key=len, reverse=True)


def tidy(path, flags):
    run = subprocess.run(["clang-tidy", "--quiet", "--warnings-as-errors=*", "--config-file=.clang-tidy", path, "--", *flags],
                         text=True, capture_output=True)
    if run.returncode != 0 and not run.stdout.strip():  # a crash, or options that it does not know
        return f"{path}: clang-tidy ended with status {run.returncode}: {run.stderr[-2000:]}\n"
    return run.stdout


def lint(name, members, folder, flags):
    if len(members) == 1:
        return tidy(members[0], flags)
    together = f"{folder}/{name}.cpp"
    pathlib.Path(together).write_text("".join(f'#include "{path}"  // NOLINT\n' for path in members))
    said = tidy(together, flags)
    if "[clang-diagnostic-error" not in said:
        return said
    half = len(members) // 2
    return lint(name + "a", members[:half], folder, flags) + lint(name + "b", members[half:], folder, flags)


def main():
    split = sys.argv.index("--")
    files, flags = sys.argv[1:split], sys.argv[split + 1:]
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = [pool.submit(lint, f"group_{i}", group, folder, flags) for i, group in enumerate(groups_of(files))]
        said = "".join(run.result() for run in runs)
    print(said, end="")
    sys.exit(1 if said.strip() else 0)


main()
