"""Several processes on one GPU, for dev/gpu_check.sh: the losses of one process must come out.

NCCL refuses two ranks on one GPU, so they exchange over MPI, staged through page-locked memory: every line of sharding runs, at
no speed worth noting. NCCL itself is seen with a communicator of one rank: calls, types, order on the streams, nothing more.
"""
import os
import shutil


def find_mpirun(build):
    """The one that was carried beside the programs, or this machine's; None where there is none."""
    carried = os.path.join(os.path.dirname(build), "mpi", "bin", "mpirun")
    return carried if os.access(carried, os.X_OK) else shutil.which("mpirun")


def command(mpirun, ranks):
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return [mpirun, "-q", *root, "--oversubscribe", "--bind-to", "none", "-np", str(ranks)] if ranks > 1 else []


def curves(run, sizes):
    """The losses of each step for 1, 2 and 3 ranks: {1: [...], 2: [...], 3: [...]}. `run(ranks, options)` trains and returns
    the lines of its log. Six rows in all divide by 1, 2 and 3."""
    found = {}
    for ranks in (1, 2, 3):
        lines = run(ranks, ["--batch-size", str(sizes["rows"] // 6), "--global-batch", str(sizes["rows"]), "--seq-len", str(sizes["T"]),
                            "--steps", str(sizes["steps"]), "--hidden", "muon:lr=0.002"])
        found[ranks] = [line["loss"] for line in lines if line["type"] == "train"]
    return found


def far(found):
    """The largest relative difference from one rank's losses."""
    return max(abs(a / b - 1) for ranks in found for a, b in zip(found[ranks], found[1]))
