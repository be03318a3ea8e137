"""Newton-Schulz as a picture: a polynomial and its iterates on the way to sign(x), as train_gpt computes them."""
import math

from page import number, picture, plot, table
from runs import Stopped, call

WHAT = """The first version of the paper, the one that we could read, has no figure; its Appendix A asks for this one.
The cubic Newton-Schulz step acts on singular values as f(x) = 3/2 x - 1/2 x^3. Repeated, it goes to sign(x) where |x|
< √3; from there to about 2 it goes to the wrong sign, silently; at √5 it swings between two values; beyond, it
diverges. The dashed lines are √3, 2 and √5. The second picture is the family of equation 37 near 0: what becomes of a
singular value x of G / ‖G‖_F after all steps of a set. All numbers are printed by `train_gpt polar --ns SET --steps N
--plot FILE`."""
SETS = ["cubic", "keller5", "polar-express", "modula6", "cans"]


def main(lab, page, corpora):
    try:
        iterates = {steps: points(lab, "cubic", steps) for steps in (1, 2, 3, 5, 8)}
        family = {name: points(lab, name, 5 if name == "cubic" else None) for name in SETS}
    except Stopped as error:
        lab.skip("figure1", str(error).splitlines()[0])
        return
    lines = [{"x": x, "y": y, "title": "f" if steps == 1 else f"{steps} times"} for steps, (x, y) in iterates.items()]
    for mark in (math.sqrt(3), 2, math.sqrt(5)):
        lines += [{"x": [side * mark] * 2, "y": [-2.4, 2.4], "with": "lines dt 2", "color": "#888888"} for side in (-1, 1)]
    plot(page.folder / "figure1.png", lines,
         "set xrange [-2.4:2.4]\nset yrange [-2.4:2.4]\nset xlabel 'x'\nset ylabel 'f(f(... x))'\nset key outside right")
    near = [{"x": x, "y": y, "title": name + (", 5 steps" if name == "cubic" else "")} for name, (x, y) in family.items()]
    plot(page.folder / "figure1-family.png", near,
         "set logscale x\nset xrange [0.001:1]\nset yrange [0:1.3]\nset xlabel 'singular value'\nset ylabel 'after all steps'\n"
         "set key bottom right")
    rows = []
    for name, (x, y) in family.items():
        inside = [value for at, value in zip(x, y) if 0.01 <= at <= 1]
        rows.append([name, number(min(inside)), number(max(inside))])
    parts = [picture("the cubic and its iterates", "figure1.png"), picture("the family near zero", "figure1-family.png"),
             table(["set", "least for x in [0.01, 1]", "largest"], rows)]
    page.section("figure1", "Figure 1: the way to the polar factor", WHAT, parts, {row[0]: row[1:] for row in rows}, [])


def points(lab, method, steps):
    """(x, what the steps make of it)"""
    file = lab.folder / f"polar-{method}-{steps}.dat"
    call([lab.program, "polar", "--ns", method, "--plot", str(file)] + (["--steps", str(steps)] if steps else []))
    rows = [line.split() for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return [float(row[0]) for row in rows], [float(row[-1]) for row in rows]
