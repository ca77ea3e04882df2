"""`python -m layalign.train.demo.real`: trains and evaluates the systems; with --ship, exports the best LayAlign run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from layalign.train.demo.real.data import REAL_SHARE
from layalign.train.demo.real.experiment import SEEDS, SYSTEMS_OF_THE_PAPER, run_experiment
from layalign.train.demo.real.export import ship
from layalign.train.demo.real.plan import Settings
from layalign.train.demo.real.shipped import SHIPPED
from layalign.train.demo.systems import TITLES


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: what a user can mend is one line on standard error and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m layalign.train.demo.real", description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/experiment"), help="folder of the experiment; the same one resumes")
    add("--data", type=Path, help="folder with tatoeba_pairs, tatoeba_laser, mgsm, msvamp, gsm8k")
    add("--systems", nargs="+", default=list(SYSTEMS_OF_THE_PAPER), choices=list(TITLES), metavar="NAME")
    add("--seeds", nargs="+", type=int, default=list(SEEDS), help="LangBridge and ablations: the first alone")
    add("--steps", type=int, help="optimizer steps of each run over both stages")
    add("--minutes", type=float, help="instead: as many steps as LayAlign does in this time")
    add("--precision", choices=["fp32", "bf16"], help="of the training; the recipe's own without it")
    add("--questions", type=int, default=50, help="held-out problems a language")
    add("--benchmark-questions", type=int, default=5, help="MSVAMP and MGSM questions a language")
    add("--sentences", type=int, default=16, help="LASER sentences a language")
    share = "of the translation stage's records: sentence pairs of --data and --interfaces"
    add("--real-share", type=float, default=REAL_SHARE, help=share)
    add("--interfaces", action="store_true", help="such pairs are also those of programs' interfaces, 104 MB, fetched")
    add("--cache", type=Path, help="folder of the converted models")
    add("--ship", action="store_true", help=f"export the best LayAlign run of --output to {SHIPPED.name}/")
    given = vars(parser.parse_args(arguments))
    try:
        if given.pop("ship"):
            print(ship(given["output"]))
        else:
            output, systems, seeds, cache = (given.pop(name) for name in ("output", "systems", "seeds", "cache"))
            run_experiment(output, systems, seeds, Settings(**given), cache)
    except ValueError as error:
        print(f"experiment: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
