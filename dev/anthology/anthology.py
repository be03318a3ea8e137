#!/usr/bin/env python3
"""The experiments of `make anthology`: starts trainings, reads what they say, writes a page with tables and pictures.

dev/anthology/anthology.py [--quick] [--only race,transfer] [--corpus FILE] [--results FOLDER]

Needs a built train_gpt, gnuplot and Python's standard library. What was trained is kept in --out: the same command goes on
where it was interrupted and draws the page again, with the words of words.md. --quick makes everything tiny, to see that
it works; its numbers mean nothing.
"""
import argparse
import lzma
import pathlib
import subprocess
import sys
import time

import descent
import equivalences
import figure1
import prodigy
import race
import transfer
from page import Page
from runs import Lab, Stopped

HERE = pathlib.Path(__file__).resolve().parent
EXPERIMENTS = {"figure1": figure1, "equivalences": equivalences, "descent": descent, "prodigy": prodigy, "race": race,
               "transfer": transfer}
CORPUS_BYTES = 16_000_000  # of another corpus: more than any training here reads


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="everything tiny: a test of these scripts")
    parser.add_argument("--only", default=",".join(EXPERIMENTS), help="experiments to make, with commas")
    parser.add_argument("--corpus", help="another text for the race, .txt or .txt.xz; default: the Wikipedia corpus of "
                        "../shared/data if it is there; none: no second text")
    parser.add_argument("--program", default="build/cpu/train_gpt")
    parser.add_argument("--out", default="out/anthology", help="folder for trainings")
    parser.add_argument("--results", help="folder for the page; default: dev/results/anthology, OUT/part with --quick or "
                        "--only")
    chosen = parser.parse_args()
    whole = not chosen.quick and chosen.only == ",".join(EXPERIMENTS)
    chosen.results = chosen.results or ("dev/results/anthology" if whole else f"{chosen.out}/part")
    chosen.only = chosen.only.split(",")
    unknown = set(chosen.only) - set(EXPERIMENTS)
    if unknown:
        parser.error(f"no such experiment, {', '.join(sorted(unknown))}, choose among {', '.join(EXPERIMENTS)}")
    if chosen.corpus not in (None, "none") and not pathlib.Path(chosen.corpus).exists():
        parser.error(f"no such file, --corpus {chosen.corpus}, name a text")
    return chosen


def find_corpora(lab, asked):
    """{name: options}: the King James Bible, one batch of it, and another text where there is one."""
    text = lab.folder / "data" / "bible.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    if not text.exists():
        subprocess.run(["data/kjv.sh", str(text)], check=True)
    batch = text.with_name("one-batch.txt")
    batch.write_bytes(text.read_bytes()[:1200])
    corpora = {"bible": lab.prepare(text, "bible"), "one batch": lab.prepare(batch, "one-batch", val_fraction=0.1)}
    default = HERE.parents[1] / "../shared/data/corpus-wikipedia.txt.xz"
    other = pathlib.Path(asked) if asked else default
    if asked != "none" and other.exists():
        name = other.name.removesuffix(".xz").removesuffix(".txt").removeprefix("corpus-")
        part = text.with_name(f"{name}.txt")
        if not part.exists():
            with (lzma.open if other.suffix == ".xz" else open)(other, "rb") as file:
                part.write_bytes(file.read(CORPUS_BYTES))
        corpora[name] = lab.prepare(part, name)
    return corpora


def main():
    chosen = arguments()
    start = time.monotonic()
    lab = Lab(chosen.program, chosen.out, quick=chosen.quick)
    page = Page(chosen.results, HERE / "words.md")
    corpora = find_corpora(lab, chosen.corpus)
    for name in chosen.only:
        print(f"--- {name}", flush=True)
        EXPERIMENTS[name].main(lab, page, corpora)
    page.finish(lab, time.monotonic() - start)
    print(f"the page: {page.folder}/README.md", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (Stopped, subprocess.CalledProcessError) as error:
        sys.exit(f"dev/anthology: error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on")
