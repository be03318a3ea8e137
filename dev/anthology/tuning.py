"""The same small search of a step size for everybody."""
import math
import statistics

TRIED = 5  # step sizes of a search,
SEEDS = (None, 1)  # each with these; None: that of train_gpt when nothing is said


def tune(lab, cases, what):
    """Best step sizes. `cases` is {name: (options of a step size, first guess)}; returns {name: (lr, at_edge, results)}, and
    leaves out what train_gpt refuses. Five step sizes each: the guess, four times more and less, then the two neighbours of
    the best, or where it lies at the edge, two more beyond it. The best has the lowest mean loss over the seeds."""
    seeds = SEEDS[:1] if lab.quick else SEEDS
    seeded = {(name, seed): (with_seed(options, seed), first) for name, (options, first) in cases.items() for seed in seeds}
    found = {key: {} for key in seeded}  # (name, seed) -> {octaves from the guess: Result}
    means = {}  # name -> {octaves from the guess: mean loss}

    def try_more(octaves, what):
        try_octaves(lab, seeded, found, {(name, seed): octaves[name] for name, seed in found}, what)
        for name, seed in found:
            means[name] = {octave: statistics.fmean(found[name, each][octave].loss for each in seeds)
                           for octave in found[name, seed]}

    try_more({name: (0,) if lab.quick else (-2, 0, 2) for name in cases}, f"{what}, step sizes")
    for name in [name for name in cases if found[name, seeds[0]][0].failed.startswith("refused")]:
        lab.skip(name, found[name, seeds[0]][0].failed)
        del means[name]
        for seed in seeds:
            del found[name, seed]
    if not lab.quick:
        more = {-2: (-3, -4), 0: (-1, 1), 2: (3, 4)}
        try_more({name: more[lowest(means[name])] for name in means}, f"{what}, step sizes between")
    return {name: (cases[name][1] * 2.0**lowest(mean), lowest(mean) in (min(mean), max(mean)),
                   [run for seed in seeds for run in found[name, seed].values()]) for name, mean in means.items()}


def with_seed(options, seed):
    """The same options of a step size, with this seed."""
    return options if seed is None else lambda lr: options(lr) | {"seed": seed}


def try_octaves(lab, cases, found, octaves, what):
    wanted = [(name, octave) for name in octaves for octave in octaves[name] if octave not in found[name]]
    runs = lab.train([cases[name][0](cases[name][1] * 2.0**octave) for name, octave in wanted], what)
    for (name, octave), run in zip(wanted, runs):
        found[name][octave] = run


def best(tried):
    """The octave whose training has the lowest loss."""
    return lowest({octave: run.loss for octave, run in tried.items()})


def lowest(losses):
    return min(losses, key=losses.get)


def valley(tried):
    """The lowest point of a parabola through the best octave and its neighbours; the octave itself at an edge."""
    low = best(tried)
    y = [tried[octave].loss if octave in tried else math.inf for octave in (low - 1, low, low + 1)]
    if not all(map(math.isfinite, y)) or y[0] - 2 * y[1] + y[2] <= 0:
        return float(low)
    return low + 0.5 * (y[0] - y[2]) / (y[0] - 2 * y[1] + y[2])
