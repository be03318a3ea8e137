"""The same small search of a step size for everybody."""
import math

TRIED = 5  # trainings of a search


def tune(lab, cases, what):
    """Best step sizes. `cases` is {name: (options of a step size, first guess)}; returns {name: (lr, at_edge, results)}, and
    leaves out what train_gpt refuses. Five step sizes each: the guess, four times more and less, then the two neighbours of
    the best, or where it lies at the edge, two more beyond it."""
    found = {name: {} for name in cases}  # name -> {octaves from the guess: Result}
    try_octaves(lab, cases, found, {name: (0,) if lab.quick else (-2, 0, 2) for name in cases}, f"{what}, step sizes")
    for name in [name for name in cases if found[name][0].failed.startswith("refused")]:
        lab.skip(name, found.pop(name)[0].failed)
    if not lab.quick:
        more = {-2: (-3, -4), 0: (-1, 1), 2: (3, 4)}
        try_octaves(lab, cases, found, {name: more[best(found[name])] for name in found}, f"{what}, step sizes between")
    return {name: (cases[name][1] * 2.0**best(tried), best(tried) in (min(tried), max(tried)), list(tried.values()))
            for name, tried in found.items()}


def try_octaves(lab, cases, found, octaves, what):
    wanted = [(name, octave) for name in octaves for octave in octaves[name] if octave not in found[name]]
    runs = lab.train([cases[name][0](cases[name][1] * 2.0**octave) for name, octave in wanted], what)
    for (name, octave), run in zip(wanted, runs):
        found[name][octave] = run


def best(tried):
    """The octave with the lowest loss."""
    return min(tried, key=lambda octave: tried[octave].loss)


def valley(tried):
    """The lowest point of a parabola through the best octave and its neighbours; the octave itself at an edge."""
    low = best(tried)
    y = [tried[octave].loss if octave in tried else math.inf for octave in (low - 1, low, low + 1)]
    if not all(map(math.isfinite, y)) or y[0] - 2 * y[1] + y[2] <= 0:
        return float(low)
    return low + 0.5 * (y[0] - y[2]) / (y[0] - 2 * y[1] + y[2])
