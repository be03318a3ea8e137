"""What all stages of dev/gpu_check.sh share: options, folders, environment, and running programs within their time."""
import os
import shutil
import subprocess
import time

import suites

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class Failed(Exception):
    """A stage that went wrong, and why; with the figures that it has all the same."""

    def __init__(self, why, figures=None):
        super().__init__(why)
        self.figures = figures


class Skipped(Exception):
    """A stage that cannot run here, and why."""


class Tools:
    """One of them for all stages."""

    def __init__(self, options):
        self.o = options
        self.out = os.path.abspath(options.out)
        self.logs = os.path.join(self.out, "logs")  # written as they grow: a run that is killed leaves them
        self.work = os.path.join(ROOT, "build", f"gpu-check-{os.getpid()}")  # large: checkpoints
        self.build = os.path.abspath(options.build)
        self.env = dict(os.environ)
        self.until = time.monotonic() + options.time_limit
        self.stage_until = self.until
        self.stage = ""
        os.makedirs(self.work)
        shutil.rmtree(self.logs, ignore_errors=True)
        os.makedirs(self.logs)

    def program(self, name):
        path = os.path.join(self.build, name)
        if not os.access(path, os.X_OK):
            raise Skipped(f"no program {path}")
        return path

    def log(self, name=None):
        return os.path.join(self.logs, f"{self.stage}{'-' + name if name else ''}.log")

    def left(self):
        return max(1.0, self.stage_until - time.monotonic())

    def run(self, command, own_libraries=True, check=True, name=None):
        """Runs a program to its end or to the end of the stage's time; returns what it printed, both streams."""
        log = self.log(name)
        with open(log, "ab") as file:
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            start = file.tell()
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                       env=self.env if own_libraries else os.environ, start_new_session=True)
            try:
                status = process.wait(self.left())
            except subprocess.TimeoutExpired:
                suites.stop(process)
                raise Failed(f"{os.path.basename(command[0])} was stopped: the stage's time was over") from None
        with open(log, "rb") as file:
            file.seek(start)
            text = file.read().decode(errors="replace")
        if check and status != 0:
            last = " / ".join(text.strip().splitlines()[-3:])
            raise Failed(f"{os.path.basename(command[0])} ended with status {status}: {last}")
        return text

    def size(self, real, tiny):
        return tiny if self.o.self_test else real
