"""English word problems of one operation in more relations than the ten languages' problems have: what the encoder reads alike in other
languages need not be written in them."""

from __future__ import annotations

import random
from collections.abc import Iterator

from layalign.train.demo.problems import REAL, place_by_place
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
        "{a} ran {x} kilometres and {b} ran {y} kilometres. How much farther did {a} run?",
        "The red bag holds {y} {n} and the green bag holds {x} {n}. How many more are in the green bag?",
        "Last week {a} read {y} pages, this week {x} pages. How many pages more did {a} read this week?",
        "A chair costs {y} dollars and a table costs {x} dollars. By how many dollars is the table dearer?",
        "{a} drew {x} pictures and {w} maps, {b} drew {y} pictures. How many more pictures than {b} did {a} draw?",
        "In a class there are {x} girls and {y} boys. How many fewer boys than girls are there?",
        "{a} needs {x} minutes to walk to school and {y} minutes by bus. How many minutes does the bus save?",
    ),
    "total": (
        "+",
        "{a} has {x} {n}. {b} has {y} {n}. How many {n} do they have together?",
        "A shop sold {x} {n} in the morning and {y} in the afternoon. How many {n} did it sell that day?",
        "There are {x} red {n} and {y} blue {n} in a drawer. How many {n} are in the drawer?",
        "{a} picked {x} {n} on Monday and {y} on Tuesday. How many {n} did {a} pick altogether?",
        "{x} girls and {y} boys went on a trip. How many children went on the trip?",
        "{a} paid {x} dollars for {n} and {y} dollars for {m}. How much did {a} pay in all?",
        "A train had {x} passengers, and {y} more got on. How many passengers are on the train now?",
        "{a} walked {x} steps before lunch and {y} steps after it. How many steps did {a} walk?",
        "{a} has {y} {n} more than {b}. {b} has {x} {n}. How many {n} does {a} have?",
        "{b} is {x} years old. {a} is {y} years older. How old is {a}?",
        "A baker made {x} {n}, {w} {m} and then {y} {n} again. How many {n} did the baker make?",
    ),
    "less": (
        "-",
        "{a} has {y} {n} fewer than {b}. {b} has {x} {n}. How many {n} does {a} have?",
        "{b} is {x} years old. {a} is {y} years younger. How old is {a}?",
        "There were {x} {n} in the box. {a} broke {y} of them. How many {n} are still whole?",
        "Of {x} children {y} stayed at home. How many children came?",
        "{a} has {x} {n}, and {y} of them are red. The others are blue. How many {n} are blue?",
        "A book has {x} pages. {a} has read {y} of them. How many pages are left to read?",
        "{x} birds sat in a tree and {y} flew away. How many birds stayed?",
        "{a} had {x} {n} and {w} {m}. {a} lost {y} {n}. How many {n} does {a} have left?",
        "A rope was {x} metres long. {a} cut off {y} metres. How long is the rope now?",
        "{x} {n} lay on the table, and {a} ate {y}. How many {n} were left?",
    ),
    "change": (
        "-",
        "{a} had {y} {n}. {b} gave {a} some more, and now {a} has {x}. How many {n} did {b} give?",
        "There were {x} {n} on the table. {a} took some of them and {y} were left. How many {n} did {a} take?",
        "{a} wants to have {x} {n} and has {y} so far. How many {n} does {a} still need?",
        "{a} had {x} dollars and spent {y} dollars on {n}. How many dollars are left?",
        "{a} and {b} have {x} {n} together. {a} has {y} of them. How many {n} does {b} have?",
        "There were {y} people in the hall. Some came later, and then there were {x}. How many people came later?",
        "{a} had {x} {n} and threw some away. Now {a} has {y} {n}. How many {n} did {a} throw away?",
        "In the morning it was {y} degrees, at noon {x} degrees. By how many degrees did it become warmer?",
        "{a} has to lay {x} tiles and has laid {y}. How many tiles remain?",
        "A bus has {x} seats, and {y} are taken. How many seats are free?",
    ),
    "start": (
        "+",
        "{a} gave {y} {n} to {b} and had {x} left. How many {n} did {a} have before?",
        "After {a} spent {y} dollars, {x} dollars were left. How many dollars did {a} have at first?",
        "{y} {n} were taken out of a bag and {x} stayed in it. How many {n} were in the bag at first?",
        "{y} guests went home and {x} guests stayed. How many guests had there been?",
        "{a} sold {y} of the {n} and still has {x}. How many {n} were there in the beginning?",
        "{a} ate some {n}: {y} were eaten and {x} remain. How many {n} had there been?",
        "When {y} players had left the team, it had {x} players. How many players did it have before that?",
        "{b} has {x} {n}. That is {y} fewer than {a} has. How many {n} does {a} have?",
    ),
    "product": (
        "*",
        "There are {x} boxes with {y} {n} in each. How many {n} are there in all?",
        "{a} makes {x} {n} a day. How many {n} does {a} make in {y} days?",
        "One of the {n} costs {x} dollars. How many dollars do {y} {n} cost?",
        "{x} children brought {y} {n} each. How many {n} did they bring?",
        "{a} reads {y} pages every evening. How many pages does {a} read in {x} evenings?",
        "In a hall there are {x} rows of {y} chairs. How many chairs are in the hall?",
        "{a} has {y} {n}. {b} has {x} times as many. How many {n} does {b} have?",
        "A box weighs {y} kilos. How many kilos do {x} such boxes weigh?",
        "{a} works {x} hours a day and earns {y} dollars an hour. How many dollars does {a} earn a day?",
    ),
    "share": (
        "/",
        "{a} shares {x} {n} equally among {y} friends. How many {n} does each friend get?",
        "{a} puts {x} {n} into bags of {y}. How many bags are needed?",
        "{a} made {x} {n} in {y} days, the same number every day. How many {n} did {a} make each day?",
        "{y} tickets cost {x} dollars. How many dollars does one ticket cost?",
        "{x} pupils form groups of {y}. How many groups are there?",
        "A book of {x} pages was read in {y} days, as many pages each day. How many pages were read a day?",
        "{a} has {x} {n}, {y} times as many as {b}. How many {n} does {b} have?",
        "{x} {n} stand in {y} equal rows. How many {n} are in a row?",
        "{a} makes {y} {n} an hour and has made {x}. How many hours did that take?",
        "A ribbon of {x} metres is cut into pieces of {y} metres. How many pieces are there?",
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
        pattern = choose.choice(patterns)
        told, asked = pattern.format(**words).rsplit(". ", 1)
        beside = [choose.choice(BESIDE).format(**words)] if "{w}" not in pattern and choose.random() < 1 / 3 else []
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
        if max(left, result) <= 100 and not REAL.writes_held_out(left, sign, right):
            return left, right, result
