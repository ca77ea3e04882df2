"""`python -m layalign.train.real.proof`: trains and evaluates the systems; with --ship, exports the best LayAlign run."""

import argparse
import sys
from pathlib import Path

from layalign.train.real.proof.data import REAL_SHARE
from layalign.train.real.proof.driver import run_proof
from layalign.train.real.proof.systems import DEFAULT, TITLES
from layalign.train.real.shipped import SHIPPED, ship


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m layalign.train.real.proof", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/proof"), help="folder of the proof; the same one resumes"
    )
    parser.add_argument("--data", type=Path, help="folder with tatoeba_pairs, tatoeba_laser, mgsm, msvamp, gsm8k")
    parser.add_argument("--systems", nargs="+", default=list(DEFAULT), choices=list(TITLES), metavar="NAME")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="LangBridge and ablations: the first alone"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps of each run over both stages")
    parser.add_argument("--minutes", type=float, help="instead: as many steps as LayAlign does in this time")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="of the training; the recipe's own without it")
    parser.add_argument("--questions", type=int, default=50, help="held-out problems a language")
    parser.add_argument("--benchmark-questions", type=int, default=5, help="MSVAMP and MGSM questions a language")
    parser.add_argument("--sentences", type=int, default=16, help="LASER sentences a language")
    parser.add_argument(
        "--real-share",
        type=float,
        default=REAL_SHARE,
        help="of the translation stage's records: sentence pairs of --data",
    )
    parser.add_argument("--cache", type=Path, help="folder of the converted models")
    parser.add_argument(
        "--ship", action="store_true", help=f"export the best LayAlign run of --output to {SHIPPED.name}/"
    )
    given = vars(parser.parse_args(arguments))
    try:
        if given.pop("ship"):
            print(ship(given["output"]))
        else:
            run_proof(**given)
    except ValueError as error:
        print(f"proof: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
