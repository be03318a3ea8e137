"""The paper's picture of Newton-Schulz: a polynomial and its iterates on the way to sign(x), as train_gpt computes them."""
import math

from page import panels, picture, plot
from runs import Stopped, call


def main(lab, page, corpora):
    try:
        iterates = {steps: points(lab, "cubic", steps) for steps in (1, 2, 3, 5, 10)}
    except Stopped as error:
        lab.skip("figure1", str(error).splitlines()[0])
        return


def points(lab, method, steps):
    file = lab.folder / f"polar-{method}-{steps}.dat"
    call([lab.program, "polar", "--ns", method, "--steps", str(steps), "--plot", str(file)])
    rows = [line.split() for line in file.read_text().splitlines() if line and not line.startswith("#")]
    return [float(row[0]) for row in rows], [float(row[1]) for row in rows]
