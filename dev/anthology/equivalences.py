"""Rules that are the same on paper, over a training run: how far apart do float32 weights end?"""
import math

from page import number, table
from runs import START

ROLES = ("hidden", "embedding", "position", "vector")
REST = "sgd:lr=0.1"  # holds the other roles: smooth, so that it does not blow up rounding as a sign does
# What is compared, the roles that both rules hold, rule A, rule B, further options of A.
PAIRS = [
    ("Adam without averages = sign", ROLES, "sign:lr=0.002", "adam:lr=0.002,beta1=0,beta2=0,eps=0", {}),
    ("Lion with equal betas = Signum", ROLES, "signum:lr=0.002,beta=0.9", "lion:lr=0.002,beta1=0.9,beta2=0.9", {}),
    ("Shampoo without accumulation = spectral descent", ("hidden",), "spectral:lr=0.02,ns=svd",
     "shampoo:lr=0.02,accumulate=none,momentum=0,graft=none", {}),
    ("Muon without momentum = spectral descent", ("hidden",), "spectral:lr=0.02,ns=svd",
     "muon:lr=0.02,momentum=0,ns=svd,scale=none", {}),
    ("Scion, constrained = Muon with decay", ("hidden",), "muon:lr=0.02,momentum=0.9,nesterov=0,ns=svd,scale=rms,wd=0.05",
     "scion:lr=0.001,radius=20,constrained=1,alpha=0.1,ns=svd", {}),
    ("Prodigy without averages = sign with escape velocity", ROLES, "sign", "prodigy:variant=no-ema,eta0=1e-6",
     {"escape": "1e-6"}),
]
WHAT = """Two trainings of gpt2-nano on the same batches, step sizes constant, one thread each. The number is how far
apart the weights of the whole model are after some steps, as a share of the way that they have gone from the start,
||A - B|| / ||A - W0|| in the Frobenius norm; and the largest relative difference between the losses of the same step.
The two controls under each pair show what "different" looks like: A with a step size that is 1 % larger, and A
against itself with other batches. Where a rule takes the sign of something, rounding decides about entries that are
nearly zero (of the biases of keys the gradient is zero but for rounding), so a difference of rounding grows from step
to step. Where a gradient lacks directions the dual vector is not unique (Proposition 5): LayerNorm takes the mean out
of what goes into a matrix and, backwards, out of what comes from it, so at the start one singular value or more is
zero but for rounding. Both ways to the polar factor leave out what is below 1e-6 of the largest singular value.
So the last column compares what the first steps achieve, <G, dW> over the tensors
that both rules hold: its relative difference (to the six digits of the telemetry)."""


def main(lab, page, corpora):
    horizons = (1, 2, 4) if lab.quick else (1, 10, 100)
    rows, summary, results = [], [], []
    start = lab.train([lab.base | corpora["bible"] | START], "equivalences: the start")[0].initial_weights()
    for name, roles, a, b, more in PAIRS:
        options = [with_rule(a, roles) | more, with_rule(b, roles)] + controls(a, roles, more)
        base = lab.base | corpora["bible"] | {"schedule": "constant", "keep": 1}
        runs = lab.train([base | {"steps": steps} | ({"norms-every": 1} if steps == 1 else {}) | option
                          for option in options for steps in horizons],
                         f"equivalences: {name}")
        refused = next((run.failed for run in runs if run.failed), None)
        if refused:
            lab.skip(name, refused)
            continue
        results += runs
        first, second, *others = (runs[i:i + len(horizons)] for i in range(0, len(runs), len(horizons)))
        for what, other in [(name, second)] + list(zip(("control: step size + 1 %", "control: other batches"), others)):
            apart = [share_apart(x, y, start, steps) for x, y, steps in zip(first, other, horizons)]
            losses = max(abs(x - y) / x for x, y in zip(first[-1].curve("train")[1], other[-1].curve("train")[1]))
            achieved = [first_order(run[0], roles) for run in (first, other)]
            achieved = abs(achieved[0] - achieved[1]) / achieved[0]
            labels = (f"**{what}**", f"`{a}`", f"`{b}`") if other is second else (what, "", "")
            rows.append([*labels, *(number(x, 2) for x in apart), number(losses, 2), number(achieved, 2)])
            summary.append({"pair": name, "what": what, "apart": apart, "losses": losses,
                            "first_order": achieved})
    head = ["", "A", "B"] + [f"{steps} step{'s' * (steps > 1)}" for steps in horizons] + ["losses", "descent of step 1"]
    page.section("equivalences", "Equal on paper, measured", WHAT, [table(head, rows)], summary,
                 results)


def first_order(run, roles):
    """-<G, dW> of the first step over the tensors of these roles."""
    tensors = run.lines("norms")[0]["tensors"].values()
    return sum(tensor["alignment"] * tensor["gradient_dual"] * tensor["step"] for tensor in tensors
               if tensor["role"] in roles and tensor["alignment"] is not None)


def with_rule(rule, roles):
    return {role: rule if role in roles else REST for role in ROLES}


def controls(rule, roles, more):
    """A with a larger step and A with other batches."""
    if more:  # the escape velocity, instead of lr
        larger = with_rule(rule, roles) | {name: f"{float(value) * 1.01:g}" for name, value in more.items()}
    else:
        name, _, keys = rule.partition(":")
        larger = with_rule(f"{name}:" + ",".join(
            f"lr={float(key[3:]) * 1.01:.6g}" if key.startswith("lr=") else key for key in keys.split(",")), roles)
    return [larger, with_rule(rule, roles) | more | {"shuffle": False}]


def share_apart(first, second, start, steps):
    a, b = first.weights(steps), second.weights(steps)
    apart = way = 0.0
    for name, (_, values) in a.items():
        apart += sum((x - y) ** 2 for x, y in zip(values, b[name][1]))
        way += sum((x - y) ** 2 for x, y in zip(values, start[name][1]))
    return math.sqrt(apart / way)
