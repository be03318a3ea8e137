"""The stage of dev/gpu_check.sh that finds or makes the programs."""
import glob
import os
import shutil
import sys
import tarfile

from tools import Failed, Skipped


def find_cuda(pattern):
    """The folder of CUDA that holds a library of such a name, and the library: the toolkit, or packages of Python."""
    nvcc = shutil.which("nvcc")
    homes = [os.path.dirname(os.path.dirname(os.path.realpath(nvcc)))] if nvcc else []
    homes += ["/usr/local/cuda"]
    for folder in sys.path:
        homes += sorted(glob.glob(os.path.join(folder, "nvidia", "*")))
    for home in homes:
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib"):
            found = glob.glob(os.path.join(home, folder, pattern))
            if found:
                return home, min(found, key=len)
    raise Failed(f"no {pattern} beside nvcc or among Python's packages")


def build(tools):
    """The program, the tests and the harness: as they came in --deps, or built here."""
    o = tools.o
    if o.self_test:
        programs = ("train_gpt", "tests/all", "harness")
        missing = [name for name in programs if not os.access(os.path.join(tools.build, name), os.X_OK)]
        if missing:
            raise Failed(f"not in {tools.build}: {' '.join(missing)}")
        for which in ([], ["--tests"]):  # every case can be asked for by its name
            names = tools.run([tools.program("harness"), "--names", *which], name="names")
            path = os.path.join(tools.work, "names.txt")
            with open(path, "w") as file:
                file.write(names)
            again = tools.run([tools.program("harness"), "--names", "--cases", path], name="names")
            if again != names:
                wrong = [a for a, b in zip(names.splitlines(), again.splitlines()) if a != b]
                raise Failed(f"the harness makes another case of {(wrong or ['some'])[0]}")
        return {"how": "already there"}
    deps = ""
    if o.deps:
        deps = os.path.abspath(o.deps)
        if os.path.isfile(deps):
            with tarfile.open(deps) as archive:
                archive.extractall(tools.work)
            deps = os.path.join(tools.work, "gpu-deps")
        if not os.path.isdir(deps):
            raise Failed(f"no folder {deps}: make it with dev/gpu_bundle.sh")
    opened = [find_cuda("libcublasLt.so*")]  # by the programs, when they need them
    nccl = False
    try:  # what several GPUs talk over, and the tests of it
        opened.append(find_cuda("libnccl.so*"))
        nccl = os.path.isfile(os.path.join(opened[-1][0], "include", "nccl.h"))
    except Failed:
        pass

    def prepend(variable, *folders):
        old = [tools.env[variable]] if tools.env.get(variable) else []
        tools.env[variable] = ":".join([f for f in folders if os.path.isdir(f)] + old)

    prepend("PATH", os.path.join(deps, "mpi", "bin"))
    prepend("CPATH", os.path.join(deps, "include"), *(os.path.join(home, "include") for home, _ in opened))
    prepend("LIBRARY_PATH", os.path.join(deps, "lib"))
    prepend("LD_LIBRARY_PATH", os.path.join(deps, "lib"), *(os.path.dirname(library) for _, library in opened))

    carried = os.path.join(deps, "bin")
    carried = carried if deps and os.path.isdir(carried) and not o.rebuild else None
    if carried:
        try:
            tools.build = carried
            for command in (["train_gpt", "--help"], ["tests/all", "--gtest_list_tests"], ["harness", "--list"], ["dev/bench", "--help"]):
                tools.run([tools.program(command[0]), *command[1:]], name="starts")
            return {"how": "built elsewhere, carried in " + os.path.basename(o.deps)}
        except (Failed, Skipped) as failure:  # other system libraries: build here
            print(f"  the carried programs do not run here ({failure}); building")
    home, runtime = find_cuda("libcudart_static.a")
    prepend("CPATH", os.path.join(home, "include"))
    prepend("LIBRARY_PATH", os.path.dirname(runtime))
    tools.build = os.path.abspath(o.build)
    programs = [os.path.join(o.build, name) for name in ("train_gpt", "tests/all", "harness", "dev/bench")]
    jobs = len(os.sched_getaffinity(0))
    try:
        tools.run(["make", "-k", f"-j{jobs}", "DEVICE=cuda", f"BUILD={o.build}", f"CUDA_HOME={home}",
                   f"NCCL={int(nccl)}"] + programs)
    except Failed:
        if carried and not os.access(os.path.join(tools.build, "train_gpt"), os.X_OK):
            tools.build = carried  # some of them may run all the same
        raise
    return {"how": f"built here with {jobs} jobs"}
