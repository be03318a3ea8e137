"""Runs a GoogleTest program on a GPU that may hang or be lost, for dev/gpu_check.sh.

After an illegal access every later call of a process fails, and a kernel that waits for ever never lets go: one bad kernel
would hide what all the others do. So the output is followed as it comes. A test that hangs is ended, and one after which
CUDA fails for good ends its process too; a new process goes on with the tests that are left.
"""
import os
import re
import signal
import subprocess
import time

# What CUDA says once and from then on to every call of the process.
LOST = re.compile("illegal memory access|launch failure|misaligned address|illegal instruction|invalid program counter|"
                  "shared address space|hardware stack error|device-side assert|launch timed out|uncorrectable|unknown error")
MOST_STARTS = 40


class Outcome:
    """Names of tests: what became of them."""

    def __init__(self, names):
        self.left, self.passed, self.skipped = list(names), [], []
        self.failed = {}  # and what they said

    def ended(self, name, word, said):
        self.left.remove(name)
        if word == "FAILED":
            self.failed[name] = " / ".join(line.strip() for line in said if line.strip())[:600]
        else:
            (self.passed if word == "OK" else self.skipped).append(name)


def stop(process):
    """A process whose GPU does not answer may need a while to die, or never do so."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass


def names(program, filter_, env):
    text = subprocess.run([program, "--gtest_list_tests", f"--gtest_filter={filter_}"], env=env, stdout=subprocess.PIPE, text=True,
                          timeout=60, check=True).stdout
    found, suite = [], ""
    for line in text.splitlines():
        word = line.split("  #")[0].strip()
        if line.startswith("  "):
            found.append(suite + word)
        elif re.fullmatch(r"\S+\.", word):
            suite = word
    return found


class Follower:
    """Reads what one process of the test program writes into a file, while it writes."""

    def __init__(self, path, outcome):
        self.file = open(path, encoding="utf-8", errors="replace")
        self.file.seek(0, os.SEEK_END)
        self.outcome, self.part, self.running, self.said = outcome, "", None, []
        self.lost = False  # by the test that ended last

    def read(self):
        """True when there was something new."""
        text = self.file.read()
        *lines, self.part = (self.part + text).split("\n")
        for line in lines:
            if self.lost:  # what comes behind says nothing
                break
            found = re.match(r"\[ +(RUN|OK|FAILED|SKIPPED) +\] (.*)", line)
            if not found:
                self.said.append(line)
            elif found.group(1) == "RUN":
                self.running, self.said = found.group(2), []
            elif self.running and found.group(2).startswith(self.running):  # not the summary, which names them again
                self.end(found.group(1))
        return bool(text)

    def end(self, word, why=None):
        said = [why] + self.said[-3:] if why else self.said
        self.lost = word == "FAILED" and bool(LOST.search("\n".join(said)))
        self.outcome.ended(self.running, word, said)
        self.running = None


def one_process(command, log, env, until, patience, outcome):
    """Runs the tests that are left, to the end or until one of them crashes, hangs or loses the GPU."""
    with open(log, "ab") as file:
        follower, quiet_since = Follower(log, outcome), time.monotonic()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    while True:
        ended = process.poll() is not None  # before the last look, so that nothing is missed
        if follower.read():
            quiet_since = time.monotonic()
        now = time.monotonic()
        why = None
        if ended:
            why = f"the process ended with status {process.returncode}"
        elif now > until:
            why = "the stage's time was over"
        elif now - quiet_since > patience:
            why = f"stopped after {patience:.0f} s without a word"
        if why or follower.lost:
            if not ended:
                stop(process)
            if follower.running:
                follower.end("FAILED", why)
            return
        time.sleep(0.01)


def run(program, filter_, log, env, until, patience, prefix=()):
    """Runs all tests that match, in as many processes as it takes."""
    outcome = Outcome(names(program, filter_, env))
    flags = log + ".flags"
    for _ in range(MOST_STARTS):
        if not outcome.left or time.monotonic() > until:
            break
        before = len(outcome.left)
        with open(flags, "w") as file:  # a minus would begin what to leave out
            file.write("--gtest_filter=" + ":".join(outcome.left).replace("-", "?") + "\n")
        one_process([*prefix, program, f"--gtest_flagfile={flags}"], log, env, until, patience, outcome)
        if len(outcome.left) == before:  # it cannot even start
            break
    return outcome
