"""What the real run trains on: generated word problems, and Tatoeba exports where the user has them."""

import itertools
import random
import zlib

from layalign.train.demo.problems import KINDS, LANGUAGES, Problem, template_held_out
from layalign.train.demo.templates import WORDINGS
from layalign.train.recipe import DataSource
from layalign.train.sources import read_sources

GENERATED = 8000
REAL_PER_LANGUAGE = 3000
MOST = 20
ONE_STEP = [kind for kind in KINDS if len(kind) - ("opening" in kind) == 1]
PAIR_FOLDERS = ("tatoeba_pairs", "pairs")
TATOEBA_CODES = {
    "ben": "bn",
    "cmn": "zh",
    "deu": "de",
    "fra": "fr",
    "jpn": "ja",
    "rus": "ru",
    "spa": "es",
    "swa": "sw",
    "swh": "sw",
    "tel": "te",
    "tha": "th",
}


def easy_problems(seed, held_out=False):
    """An endless stream of one-step problems with numbers up to 20, which the LLM can mostly do in English.

    With `held_out` those for evaluation: both their wording (combination of clauses) and their pair of numbers are kept
    from training, as in the tiny demo but for one pair in six of the small numbers too.
    """
    choose = random.Random(f"real {seed} {held_out}")
    english = WORDINGS["en"]
    while True:
        kind = choose.choice(ONE_STEP)
        problem = Problem(
            kind,
            tuple(choose.randrange(3) for _ in (*kind, "questions")),
            _draw(kind, choose),
            choose.randrange(len(english.names)),
            choose.randrange(len(english.nouns)),
            choose.randrange(len(english.containers)),
        )
        if template_held_out(problem.kind, problem.clauses) == _pair_held_out(problem) == held_out:
            yield problem


def _draw(kind, choose):
    if kind[0] == "groups":
        return choose.randint(2, 9), choose.randint(2, 9)
    first = choose.randint(3, MOST)
    return first, choose.randint(2, first - 1 if kind[1] == "losses" else MOST)


def _pair_held_out(problem):
    left, sign, right, _ = problem.steps[0]
    pair = (left, right) if sign == "-" else (min(left, right), max(left, right))
    return zlib.crc32(repr((sign, *pair)).encode()) % 6 == 0


def translation_records(seed, data=None):
    """Records of the translation stage: generated problems, and sentences of the pair files in `data`, if any."""
    return _generated("translation", seed, lambda problem: problem.text("en")) + real_pairs(data)


def task_records(seed):
    """Records of the task stage: a generated problem in any language and its worked answer in English."""
    return _generated("task", seed, lambda problem: problem.worked_answer)


def held_out_problems(per_language, seed):
    """The same generated problems, of held-out templates and numbers, in every language the generator writes.

    Each is a dict with lang, question, answer, and in English text and worked_answer.
    """
    chosen = list(itertools.islice(easy_problems(f"evaluation {seed}", held_out=True), per_language))
    return [
        {"lang": language, "question": problem.text(language), "answer": problem.number}
        | {"text": problem.text("en"), "worked_answer": problem.worked_answer}
        for language in LANGUAGES
        for problem in chosen
    ]


def pair_files(data):
    """{path: language code} of the Tatoeba exports `XXX-eng.txt` in the pair folders of `data`.

    Raises:
        ValueError: a file whose name begins with no language known here.
    """
    found = {}
    for folder in PAIR_FOLDERS if data is not None else ():
        for path in sorted((data / folder).glob("*-eng.txt")):
            code = path.name.split("-")[0]
            if code not in TATOEBA_CODES:
                raise ValueError(f"{path}: no language known for {code!r}; known: {', '.join(TATOEBA_CODES)}")
            found[path] = TATOEBA_CODES[code]
    return found


def real_pairs(data):
    """Records of the pair files: lines of English, a tab, the other language, and perhaps an attribution."""
    records = []
    for path, language in pair_files(data).items():
        with open(path, encoding="utf-8") as file:
            width = file.readline().count("\t") + 1
        columns = ["target", "source", "attribution"][:width]
        found, _ = read_sources([DataSource(format="tsv", path=str(path), columns=columns, lang=language)])
        # The exports are sorted by length; every so many lines give sentences of all lengths.
        records += found[:: -(-len(found) // REAL_PER_LANGUAGE)]
    return records


def _generated(purpose, seed, target):
    stream = easy_problems(f"{purpose} {seed}")
    return [
        {"source": problem.text(language), "target": target(problem), "lang": language}
        for problem, language in zip(stream, itertools.islice(itertools.cycle(LANGUAGES), GENERATED), strict=False)
    ]
