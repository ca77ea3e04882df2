"""English stories of two to four numbers, and questions of which each needs two of them: which ones has to be read from the question."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from layalign.train.demo.problems import REAL, place_by_place
from layalign.train.demo.wording import wording

# Names of things: a story's are of one row.
THINGS = (
    ("apples", "oranges", "pears", "plums", "bananas"),
    ("roses", "tulips", "lilies", "daisies", "sunflowers"),
    ("pencils", "pens", "erasers", "crayons", "markers"),
    ("cookies", "muffins", "cupcakes", "pies", "pretzels"),
    ("marbles", "stickers", "cards", "coins", "stamps"),
    ("ducks", "goats", "sheep", "cows", "hens"),
    ("shirts", "hats", "scarves", "socks", "jackets"),
    ("books", "magazines", "notebooks", "posters", "maps"),
    ("dolls", "balls", "kites", "puzzles", "toy cars"),
)
PLACES = ("basket", "box", "garden", "room", "shop", "school", "park", "kitchen", "bag", "store")
LARGE = 0.15  # of the numbers that the question does not need
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
# {a}, {b}: persons; {n}, {m}, {o}: things; {d}, {f}, {g}: days; {c}: a place; w, x, y, z: numbers. A question that holds
# `x - y` is answered with it; the numbers are drawn so that it can be.
STORIES: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "{a} has {x} {n} and {y} {m}.",
        {
            "how many more {n} than {m} does {a} have?": "x - y",
            "how many fewer {m} than {n} does {a} have?": "x - y",
            "how many {n} and {m} does {a} have altogether?": "x + y",
        },
    ),
    (
        "there are {x} {n}, {y} {m} and {z} {o} in the {c}.",
        {
            "how many {n} and {m} are there in the {c}?": "x + y",
            "how many {m} and {o} are there altogether?": "y + z",
            "how many more {n} than {o} are there?": "x - z",
            "how many more {m} than {n} are there in the {c}?": "y - x",
            "how many more {o} than {m} are there in the {c}?": "z - y",
        },
    ),
    (
        "{a} had {x} {n} and {y} {m}. {a} gave {z} {n} to {b}.",
        {
            "how many {n} does {a} have left?": "x - z",
            "how many more {n} than {m} did {a} have at first?": "x - y",
            "how many {n} and {m} did {a} have in the beginning?": "x + y",
        },
    ),
    (
        "{a} had {x} {n} and {y} {m}. after eating some of them, {a} had {z} {n} and {w} {m} left.",
        {
            "how many {n} did {a} eat?": "x - z",
            "how many {m} did {a} eat?": "y - w",
            "how many more {n} than {m} does {a} have now?": "z - w",
            "how many {n} and {m} are left?": "z + w",
        },
    ),
    (
        "there were {x} {n} and {y} {m} in the {c}. {a} put some more in, and now there are {z} {n} and {w} {m}.",
        {
            "how many {n} did {a} put in?": "z - x",
            "how many {m} did {a} add?": "w - y",
            "how many more {m} than {n} are in the {c} now?": "w - z",
            "how many {n} and {m} were there at first?": "x + y",
        },
    ),
    (
        "{a} lost {x} {n} and found {y} {n}. now {a} has {z} {n}.",
        {
            "how many more {n} did {a} lose than find?": "x - y",
            "how many more {n} did {a} find than lose?": "y - x",
        },
    ),
    (
        "{a} already had {z} {n}. then {a} found {x} {n} in the {c} and threw {y} away.",
        {
            "how many more {n} did {a} find than throw away?": "x - y",
            "how many {n} did {a} have after finding some in the {c}?": "z + x",
        },
    ),
    (
        "{a} has {x} {n}, {b} has {y} {n}.",
        {
            "how many more {n} than {b} does {a} have?": "x - y",
            "how many {n} do {a} and {b} have in all?": "x + y",
            "how many {n} does {a} have to give away to have as many as {b}?": "x - y",
        },
    ),
    (
        "{a} has {x} {n} and {y} {m} while {b} has {z} {n} and {w} {m}.",
        {
            "how many more {n} does {a} have than {b}?": "x - z",
            "how many more {m} does {b} have than {a}?": "w - y",
            "how many {n} do they have together?": "x + z",
            "how many {m} do {a} and {b} have altogether?": "y + w",
        },
    ),
    (
        "{a} has {x} fewer {n} and {y} more {m} than {b}. {b} has {z} {n} and {w} {m}.",
        {"how many {n} does {a} have?": "z - x", "how many {m} does {a} have?": "w + y"},
    ),
    (
        "{b} has {z} {n}. {a} has {x} {n} less than {b} and {y} {n} more than {c}.",
        {"how many {n} does {a} have?": "z - x"},
    ),
    (
        "{a} sold {x} {n} on {d}, {y} on {f} and {z} on {g}.",
        {
            "how many more {n} did {a} sell on {d} than on {f}?": "x - y",
            "how many {n} were sold on {f} and {g}?": "y + z",
            "how many {n} did {a} sell on {d} and {f} together?": "x + y",
            "how many more were sold on {g} than on {d}?": "z - x",
        },
    ),
    (
        "{a} read {x} pages on {d} and {y} pages on {f}. the book has {z} pages.",
        {
            "how many pages did {a} read in the two days?": "x + y",
            "how many more pages did {a} read on {d} than on {f}?": "x - y",
            "how many pages more did {a} read on {f}?": "y - x",
        },
    ),
    (
        "the red team has {x} goals and {y} wins. the blue team has {z} goals and {w} wins.",
        {
            "how many more goals than the blue team does the red team have?": "x - z",
            "how many wins do the teams have together?": "y + w",
            "how many goals were scored by both teams?": "x + z",
            "by how many wins is the red team behind?": "w - y",
        },
    ),
    (
        "{a} spent $ {x} on {n} and $ {y} on {m}. now {a} has $ {z}.",
        {
            "how much more did {a} spend on {n} than on {m}?": "x - y",
            "how much did {a} spend altogether?": "x + y",
        },
    ),
    (
        "{a} had $ {x}. {a} bought {n} for $ {y} and had $ {z} left after buying {m} as well.",
        {
            "how much did {a} have left after buying the {n}?": "x - y",
            "how much did {a} spend in all?": "x - z",
        },
    ),
    (
        "the old price of the {n} was {x} dollars, and it fell by {y} dollars. the {m} cost {z} dollars.",
        {"what is the new price of the {n}?": "x - y", "how much are the {m} and the {n} at the old price?": "z + x"},
    ),
    (
        "the {n} cost $ {x} and the {m} cost $ {y}.",
        {
            "how much do the {n} and the {m} cost together?": "x + y",
            "how much more do the {n} cost than the {m}?": "x - y",
            "how much cheaper are the {m}?": "x - y",
        },
    ),
    (
        "{z} visitors were in the museum. until noon {x} left and {y} came.",
        {
            "how many more visitors left than came?": "x - y",
            "how many more came than left?": "y - x",
            "how many of the first visitors stayed?": "z - x",
        },
    ),
    (
        "{x} birds sat on the roof. a cat came and some flew off, so {y} birds stayed.",
        {"how many birds flew off?": "x - y"},
    ),
    (
        "{a} is {x} years old, {b} is {y} and {b} 's mother is {z}.",
        {
            "how much older than {b} is {a}?": "x - y",
            "how many years younger than her mother is {b}?": "z - y",
            "how old will {b} be in {w} years?": "y + w",
        },
    ),
    (
        "{a} walked {x} miles in the morning and {y} miles in the afternoon, {b} walked {z} miles.",
        {
            "how far did {a} walk that day?": "x + y",
            "how much farther did {a} walk in the morning than in the afternoon?": "x - y",
            "how many miles more did {b} walk than {a} in the afternoon?": "z - y",
        },
    ),
    (
        "the oak is {x} feet tall, the birch is {y} feet tall and the fir is {z} feet tall.",
        {
            "how much taller is the birch than the oak?": "y - x",
            "how much taller is the birch than the fir?": "y - z",
            "how tall are the oak and the fir together?": "x + z",
        },
    ),
    (
        "there are {x} {n} in each of the {y} boxes. {a} has {z} {m} too.",
        {"how many {n} are in the boxes altogether?": "x * y"},
    ),
    (
        "{a} bought {y} packs of {n}. each pack has {x} {n} and costs {z} dollars.",
        {"how many {n} did {a} buy?": "x * y", "how much did {a} pay for the packs?": "y * z"},
    ),
    (
        "each {c} has {x} {n} and {z} {m}. there are {y} of them.",
        {"how many {n} are there in all?": "y * x", "how many {m} are there in all?": "y * z"},
    ),
    (
        "{a} does {x} problems an hour and works {z} hours on {d} and {y} hours on {f}.",
        {
            "how many problems does {a} do on {f}?": "x * y",
            "how many problems does {a} do on {d}?": "x * z",
            "how many hours does {a} work on the two days?": "z + y",
        },
    ),
    (
        "{a} has {x} {n} and {z} {m}. the {n} are put into {y} groups.",
        {"how many {n} are in one of the groups?": "x / y", "how many {n} and {m} are there?": "x + z"},
    ),
    (
        "{a} has {x} {n} and {z} {m}. if {a} puts {y} {n} in each bag",
        {"how many bags of {n} will there be?": "x / y"},
    ),
    (
        "there are {x} {n} for {y} friends of {a}, who also gets {z} {m}. if they share the {n} equally",
        {"how many {n} does each friend get?": "x / y"},
    ),
    (
        "{a} earns {x} dollars in {y} weeks and works {z} days a week.",
        {"how much does {a} earn in a week?": "x / y"},
    ),
    (
        "{a} needs {x} {n}. they come in packs of {y}, and a pack costs {z} dollars.",
        {"how many packs does {a} have to buy?": "x / y"},
    ),
    (
        "{x} {n} were in the {c}. {a} took {y} of them and {b} took {z}.",
        {
            "how many {n} did {a} and {b} take?": "y + z",
            "how many {n} were left after {a} took some?": "x - y",
            "how many more {n} than {b} did {a} take?": "y - z",
        },
    ),
    (
        "{a} baked {x} {n} and {y} {m}. {z} {n} and {w} {m} were sold.",
        {
            "how many {n} does {a} still have?": "x - z",
            "how many {m} does {a} still have?": "y - w",
            "how many more {n} than {m} did {a} bake?": "x - y",
            "how many {n} and {m} were sold?": "z + w",
            "how many more {n} than {m} were sold?": "z - w",
        },
    ),
    (
        "{a} gave {y} {n} to {b} and lost {z} more. {x} {n} are left.",
        {
            "how many {n} did {a} have after giving some to {b}?": "x + z",
            "how many {n} did {a} lose or give away?": "y + z",
            "how many more {n} were lost than given away?": "z - y",
        },
    ),
    (
        "{a} had {w} {m}. {a} gave away {y} {n} and has {x} {n} left.",
        {"how many {n} did {a} have to start with?": "x + y"},
    ),
    (
        "{x} {n} were in a jar. {a} took some out, and {y} {n} were still in it. {b} has {z} {n}.",
        {"how many {n} did {a} take?": "x - y"},
    ),
    (
        "a class has {x} girls and {y} boys. {z} of the girls and {w} of the boys went on the trip.",
        {
            "how many children went on the trip?": "z + w",
            "how many girls stayed at school?": "x - z",
            "how many more girls than boys are there in the class?": "x - y",
            "how many boys did not go?": "y - w",
        },
    ),
    (
        "the lake is {x} miles away and the village {y} miles. {a} is on the way to the lake and has gone {z} miles.",
        {
            "how many miles does {a} still have to go?": "x - z",
            "how many miles nearer is the village than the lake?": "x - y",
        },
    ),
    (
        "the farmer used {x} sacks of corn, {y} sacks of rice and {z} sacks of beans.",
        {
            "how many sacks of corn and beans did the farmer use?": "x + z",
            "how many more sacks of corn than of rice were used?": "x - y",
            "how many more sacks of rice than of beans did the farmer use?": "y - z",
        },
    ),
)


def story_problems(count: int, seed: int) -> Iterator[dict]:
    """So many training records, the stories in turn: sums and differences up to 100, products and quotients of 2 to 12. Half are written
    in small letters with spaces before the signs, as MSVAMP is. No sum and no difference has, or is worked by, numbers that are kept."""
    choose = random.Random(f"stories {seed}")
    persons = [forms["name"] for forms in wording("en").names]
    for place in range(count):
        story, questions = STORIES[place % len(STORIES)]
        question, asked = choose.choice(list(questions.items()))
        numbers = story_numbers(asked, choose)
        (a, b), (n, m, o), (d, f, g) = choose.sample(persons, 2), choose.sample(choose.choice(THINGS), 3), _days(choose)
        words = {"a": a, "b": b, "n": n, "m": m, "o": o, "d": d, "f": f, "g": g, "c": choose.choice(PLACES)} | numbers
        told = f"{story} {question}".format(**words)
        text = re.sub(r"([.,?])", r" \1", told.lower()) if choose.random() < 0.5 else _sentences(told)
        yield {"source": text, "target": answered(asked, numbers), "lang": "en"}


def answered(asked: str, numbers: dict[str, int]) -> str:
    """The worked answer of a question that `x - y` answers."""
    left, sign, right = asked.split()
    x, y = numbers[left], numbers[right]
    return place_by_place(x, sign, y, {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[sign])


def _sentences(text: str) -> str:
    """Capitals at the beginnings, no space after a dollar sign or before a genitive."""
    text = re.sub(r"(^|[.?] )([a-z])", lambda found: found[1] + found[2].upper(), text)
    return text.replace("$ ", "$").replace(" 's", "'s")


def _days(choose: random.Random) -> list[str]:
    return [DAYS[place] for place in sorted(choose.sample(range(len(DAYS)), 3))]


def story_numbers(asked: str, choose: random.Random) -> dict[str, int]:
    """{w, x, y, z: number} of a story, of which those that the question needs can be worked: sums and differences up to 100 that are
    not kept for evaluation, products and quotients of 2 to 12; a number that it does not need is above 100 at times."""
    left, sign, right = asked.split()
    if sign in "*/":
        small = choose.randint(2, 12), choose.randint(2, 12)
        found = {left: small[0], right: small[1]} if sign == "*" else {left: small[0] * small[1], right: small[1]}
        return {name: choose.randint(2, 40) for name in "wxyz"} | found
    while True:
        numbers = {name: choose.randint(2, 100 if choose.random() < 0.5 else 20) for name in "wxyz"}
        x, y = numbers[left], numbers[right]
        result = x + y if sign == "+" else x - y
        if 1 <= result <= 100 and not REAL.writes_held_out(x, sign, y):
            large = {name: choose.randint(101, 999) for name in numbers if choose.random() < LARGE}
            return numbers | large | {left: x, right: y}
