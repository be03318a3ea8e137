"""Newton-Schulz as a picture: a polynomial and its iterates on the way to sign(x), as train_gpt computes them."""
import math

from page import number, picture, plot, table
from runs import Stopped, call

WHAT = """The first version of the paper, the one that we could read, has no figure; its Appendix A asks for this one.
The cubic Newton-Schulz step acts on singular values as f(x) = 3/2 x - 1/2 x^3. Repeated, it goes to sign(x) where |x|
< √3; from there to about 2 it goes to the wrong sign, silently; at √5 it swings between two values; beyond, it
diverges. The dashed lines are √3, 2 and √5. The second picture is the family of equation 37 near 0: what becomes of a
singular value x of G / ‖G‖_F after all steps of a set. Its numbers are those of `train_gpt polar --ns SET --plot
FILE`, which refuses what would leave the region of convergence; the first picture, which goes there on purpose, is
drawn by the script."""
SETS = {"cubic": 5, "keller5": None, "polar-express": None, "modula6": None, "hybrid": None}
EDGE = 2.4  # of the first picture
ITERATES = (1, 2, 3, 5, 8)


def main(lab, page, corpora):
    try:
        columns = values(lab, "cubic", max(ITERATES), 0.001)
        family = {name: values(lab, name, steps, 0.001) for name, steps in SETS.items()}
    except Stopped as error:
        lab.skip("figure1", str(error).splitlines()[0])
        return
    x = [EDGE * i / 2000 for i in range(-2000, 2001)]
    lines = [{"x": x, "y": [iterate(at, steps) for at in x], "title": "f" if steps == 1 else f"{steps} times"}
             for steps in ITERATES]
    apart = max(abs(iterate(at, steps) - after) for steps in ITERATES for at, after in zip(columns[0], columns[steps]))
    for mark in (math.sqrt(3), 2, math.sqrt(5)):
        lines += [{"x": [side * mark] * 2, "y": [-2.4, 2.4], "with": "lines dt 2", "color": "#888888"} for side in (-1, 1)]
    plot(page.folder / "figure1.png", lines,
         "set xrange [-2.4:2.4]\nset yrange [-2.4:2.4]\nset xlabel 'x'\nset ylabel 'f(f(... x))'\nset key outside right")
    near = [{"x": columns[0], "y": columns[-1], "title": name + (f", {SETS[name]} steps" if SETS[name] else "")}
            for name, columns in family.items()]
    plot(page.folder / "figure1-family.png", near,
         "set logscale x\nset xrange [0.001:1]\nset yrange [0:1.3]\nset xlabel 'singular value'\nset ylabel 'after all steps'\n"
         "set key bottom right")
    rows = []
    for name, columns in family.items():
        inside = [after for x, after in zip(columns[0], columns[-1]) if x >= 0.01]
        rows.append([name, number(min(inside)), number(max(inside))])
    agree = f"Where both are defined, in [0.001, 1], the curves of the first picture are within {number(apart, 1)} of train_gpt's."
    parts = [picture("the cubic and its iterates", "figure1.png"), agree, picture("the family near zero", "figure1-family.png"),
             table(["set", "least for x in [0.01, 1]", "largest"], rows)]
    page.section("figure1", "Figure 1: the way to the polar factor", WHAT, parts, {row[0]: row[1:] for row in rows}, [])


def iterate(x, steps):
    for _ in range(steps):
        x = 1.5 * x - 0.5 * x**3 if abs(x) < 1e3 else math.inf
    return x


def values(lab, method, steps, least):
    """Columns of numbers: x in [least, 1], then what each step makes of it."""
    file = lab.folder / "polar.dat"
    more = ["--steps", str(steps)] if steps else []
    call([lab.program, "polar", "--ns", method, "--least", str(least), "--plot", str(file)] + more)
    rows = [line.split() for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return [[float(value) for value in column] for column in zip(*rows)]
