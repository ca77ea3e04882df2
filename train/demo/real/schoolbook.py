"""English word problems of one operation in more relations than the ten languages' problems have: what the encoder reads alike in other
languages need not be written in them."""

from __future__ import annotations

import random
from collections.abc import Iterator

from layalign.train.demo.problems import REAL, place_by_place, places
from layalign.train.demo.wording import wording

NOUNS = (
    *("apples", "stickers", "marbles", "cards", "shells", "eggs", "buttons", "flowers", "cups", "chairs", "coins"),
    *("candles", "oranges", "toys", "stones", "letters", "cookies", "tickets", "bottles", "spoons"),
)
# Each: the sign of the answer's equation, and wordings with its left side {x}, its right side {y} and its result {z}.
RELATIONS = {
    "comparison": (
        "-",
        "{a} has {x} {n} and {b} has {y} {n}. How many more {n} does {a} have than {b}?",
        "There are {x} {n} and {y} {m} on the shelf. How many more {n} than {m} are there?",
        "{a} made {x} {n} on Friday and {y} on Saturday. How many {n} more did {a} make on Friday?",
        "{a} is {x} years old and {b} is {y} years old. How many years older is {a}?",
        "{b} found {y} {n}. {a} found {x}. How many {n} fewer did {b} find?",
    ),
    "total": (
        "+",
        "{a} has {x} {n}. {b} has {y} {n}. How many {n} do they have together?",
        "A shop sold {x} {n} in the morning and {y} in the afternoon. How many {n} did it sell that day?",
        "There are {x} red {n} and {y} blue {n} in a drawer. How many {n} are in the drawer?",
        "{a} picked {x} {n} on Monday and {y} on Tuesday. How many {n} did {a} pick altogether?",
    ),
    "change": (
        "-",
        "{a} had {y} {n}. {b} gave {a} some more, and now {a} has {x}. How many {n} did {b} give?",
        "There were {x} {n} on the table. {a} took some of them and {y} were left. How many {n} did {a} take?",
        "{a} wants to have {x} {n} and has {y} so far. How many {n} does {a} still need?",
        "{a} had {x} dollars and spent {y} dollars on {n}. How many dollars are left?",
    ),
    "start": (
        "+",
        "{a} gave {y} {n} to {b} and had {x} left. How many {n} did {a} have before?",
        "After {a} spent {y} dollars, {x} dollars were left. How many dollars did {a} have at first?",
        "{y} {n} were taken out of a bag and {x} stayed in it. How many {n} were in the bag at first?",
    ),
    "product": (
        "*",
        "There are {x} boxes with {y} {n} in each. How many {n} are there in all?",
        "{a} makes {x} {n} a day. How many {n} does {a} make in {y} days?",
        "One of the {n} costs {x} dollars. How many dollars do {y} {n} cost?",
        "{x} children brought {y} {n} each. How many {n} did they bring?",
    ),
    "share": (
        "/",
        "{a} shares {x} {n} equally among {y} friends. How many {n} does each friend get?",
        "{a} puts {x} {n} into bags of {y}. How many bags are needed?",
        "{a} made {x} {n} in {y} days, the same number every day. How many {n} did {a} make each day?",
        "{y} tickets cost {x} dollars. How many dollars does one ticket cost?",
    ),
}
# A third of the problems have a number too many.
BESIDE = ("{a} also has {w} {m}.", "It took {w} minutes.", "There are {w} {m} as well.", "{b} has {w} {m} at home.")


def schoolbook_problems(count: int, seed: int) -> Iterator[dict]:
    """So many training records, the relations in turn: sums and differences of numbers up to 100, products up to 144, quotients of these.
    No sum and no difference has, or is worked by, numbers that are kept for evaluation."""
    choose = random.Random(f"schoolbook {seed}")
    names = [forms["name"] for forms in wording("en").names]
    for place in range(count):
        sign, *patterns = list(RELATIONS.values())[place % len(RELATIONS)]
        x, y, z = _numbers(sign, choose)
        a, b = choose.sample(names, 2)
        n, m = choose.sample(NOUNS, 2)
        words = {"a": a, "b": b, "n": n, "m": m, "x": x, "y": y, "w": choose.randint(2, 99)}
        told, asked = choose.choice(patterns).format(**words).rsplit(". ", 1)
        beside = [choose.choice(BESIDE).format(**words)] if choose.random() < 1 / 3 else []
        yield {
            "source": " ".join([f"{told}.", *beside, asked]),
            "target": place_by_place(x, sign, y, z),
            "lang": "en",
        }


def _numbers(sign: str, choose: random.Random) -> tuple[int, int, int]:
    if sign in "*/":
        left, right = choose.randint(2, 12), choose.randint(2, 12)
        return (left, right, left * right) if sign == "*" else (left * right, right, left)
    while True:
        result, right = choose.randint(2, 98), choose.randint(2, 98)
        left, right, result = (result, right, result + right) if sign == "+" else (result + right, right, result)
        if max(left, result) <= 100 and not any(REAL.pair_held_out(*pair) for pair in places(left, sign, right)):
            return left, right, result
