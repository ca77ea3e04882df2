"""What the real run trains on: generated word problems, and Tatoeba exports where the user has them."""

import itertools

from layalign.train.demo.problems import LANGUAGES, problems
from layalign.train.recipe import DataSource
from layalign.train.sources import read_sources

GENERATED = 8000
REAL_PER_LANGUAGE = 3000
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
    """An endless stream of one-step problems with numbers up to 20, which the LLM can mostly do in English."""
    stream = problems(seed, held_out=held_out)
    return (problem for problem in stream if len(problem.steps) == 1 and max(problem.numbers) <= 20)


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
