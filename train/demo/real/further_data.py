"""What the second experiment with the real pair trains on, and what it is asked."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

from layalign.folders import damage
from layalign.tasks import load_task
from layalign.train.demo.problems import FURTHER, REAL, SIGNS, TWO_STEPS, FurtherProblems, place_by_place
from layalign.train.demo.real.data import REPORT, write_records
from layalign.train.demo.real.decontaminate import benchmark_texts, decontaminated
from layalign.train.demo.real.evaluation import EvaluationSets, evaluation_sets
from layalign.train.demo.real.interfaces import LICENCES
from layalign.train.demo.real.pairs import sentence_pairs, training_questions
from layalign.train.demo.real.persons import person_problems
from layalign.train.demo.real.schoolbook import schoolbook_problems
from layalign.train.demo.real.stories import story_problems
from layalign.train.demo.real.tatoeba import LICENCE
from layalign.train.demo.real.translated_stories import translated_stories
from layalign.train.demo.wording import spell

# Of the task stage's records; the rest are generated problems of one and two steps with numbers up to 100, small ones up to 40, the least
# of one step up to 20. "last" is for a further task stage: of "wide" the LLM has seen everything and little of each.
MIXTURES = {
    "wide": {
        "pairs": 0.24,
        "people": 0.02,
        "school": 0.02,
        "stories": 0.07,
        "translated": 0.13,
        "persons": 0.08,
        "sums": 0.18,
        "small": 0.12,
        "least": 0.0,
    },
    "last": {
        "pairs": 0.24,
        "people": 0.01,
        "school": 0.01,
        "stories": 0.04,
        "translated": 0.12,
        "persons": 0.06,
        "sums": 0.10,
        "small": 0.10,
        "least": 0.20,
    },
}
# People's problems that have no more steps, and no larger number, than this.
STEPS, LARGEST = 2, 200
SMALL = FurtherProblems(limit=41)
LEAST = FurtherProblems((1,), limit=21)
DIGITS = 0.25  # of a bare sum's numbers
STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
# In the translation stage languages of n sentence pairs are seen in proportion to n to this power. In the task stage all are alike: so
# weighted there too, a quarter pairs, chrF fell from 31.0 to 25.4 in Japanese and from 34.6 to 29.6 in Telugu in 2,000 steps; alike, but
# a sixth of the records, to 25.0 and 26.8 in 2,500.
TEMPERATURE = 0.7


def prepare_further(
    folder: Path, task_records: int, data: Path, cache: str | Path | None = None, seed: int = 0, mixture: str = "wide"
) -> dict:
    """Write translation.jsonl and task.jsonl into `folder` unless they are there; return the report, as `data.prepare` does.

    The translation stage has people's sentence pairs alone. Of the task stage's records a quarter are such pairs too, so that translation
    is not lost; others are problems of one and two steps that people wrote, generated ones of more relations, and stories, all in
    English; more are stories in ten languages; nearly a fifth are bare sums; the rest are generated in ten languages, with two persons and
    with one, half of these with small numbers. Answers are worked place by place.

    Args:
        folder: where they go.
        task_records: of the task stage; the translation stage goes over its pairs again and again.
        data: folder with tatoeba_pairs/, gsm8k/ and the sets that are tested on.
        cache: of the wheels with the interfaces' pairs.
        seed: of the choice and the order.
        mixture: of the task stage, one of MIXTURES.

    Raises:
        ValueError: data that is not there or cannot be read.
    """
    if damage(folder) is None:
        return json.loads((folder / REPORT).read_text(encoding="utf-8"))
    tests = benchmark_texts(data)
    pairs, pairs_removed = sentence_pairs(data, tests, cache)
    people, people_removed = decontaminated(peoples_problems(data), tests)
    choose = random.Random(seed)
    counts = {name: round(share * task_records) for name, share in MIXTURES[mixture].items()}
    languages = Counter(row["lang"] for row in pairs)
    weights = [1 / languages[row["lang"]] for row in pairs]
    generated = task_records - sum(counts.values())
    # A tenth more than is needed, for what is taken out.
    sources = (FURTHER, generated), (SMALL, counts["small"]), (LEAST, counts["least"])
    (problems, removed), (small, small_removed), (least, least_removed) = (
        decontaminated(source.task_records(count + count // 10 + 10, seed), tests) for source, count in sources
    )
    makers = {"school": schoolbook_problems, "stories": story_problems}
    makers |= {"translated": translated_stories, "persons": person_problems}
    told = {name: decontaminated(list(make(counts[name], seed)), tests) for name, make in makers.items()}
    task = choose.choices(pairs, weights, k=counts["pairs"]) if pairs else []
    task += [people[place % len(people)] for place in range(counts["people"])] if people else []
    real = len(task)
    task += [row for rows, _ in told.values() for row in rows]
    task += bare_sums(counts["sums"], seed) + small[: counts["small"]] + least[: counts["least"]]
    task += problems[: task_records - len(task)]
    choose.shuffle(task)
    report = {
        "records": {
            "translation": {"generated": 0, "real": len(pairs)},
            "task": {"generated": len(task) - real, "real": real},
        },
        "checked_against": {name: len(texts) for name, texts in tests.items()},
        "removed": {
            "translation": {"real": pairs_removed},
            "task": {"real": people_removed, "generated": removed, "small": small_removed, "least": least_removed}
            | {name: gone for name, (_, gone) in told.items()},
        },
        "real_languages": dict(sorted(languages.items())),
        "sources": LICENCE | LICENCES | {"GSM8K, training split": "MIT"},
        "seed": seed,
    }
    write_records(folder, {"translation": pairs, "task": task}, report)
    return report


def peoples_problems(data: Path) -> list[dict]:
    """Training records of GSM8K's training problems of one or two steps over whole numbers up to 200, each step worked as the generated
    problems' are: `48 / 2 = 24, 48 + 24 = 68 + 4 = 72`; without those that write a sum or difference that is kept for evaluation.

    Raises:
        ValueError: GSM8K is not in the folder `data`.
    """
    found = []
    for row in training_questions(data):
        written, answer = row["answer"].split("####")
        steps = [STEP.fullmatch(step) for step in re.findall(r"<<(.*?)>>", written)]
        parts = [step.groups() for step in steps if step is not None]
        if not 0 < len(parts) == len(steps) <= STEPS or parts[-1][3] != answer.strip():
            continue
        worked = [(int(left), sign, int(right), int(result)) for left, sign, right, result in parts]
        kept = any(sign in "+-" and REAL.writes_held_out(left, sign, right) for left, sign, right, _ in worked)
        if not kept and max(number for left, _, right, result in worked for number in (left, right, result)) <= LARGEST:
            answer = ", ".join(place_by_place(*step) for step in worked)
            found.append({"source": " ".join(row["question"].split()), "target": answer, "lang": "en"})
    return found


def bare_sums(count: int, seed: int) -> list[dict]:
    """Training records of a generated problem's steps alone, in turn of numbers up to 100 and up to 40: `forty-seven + 14 - three`. One
    number in four is in digits, which were read wrong in 2.5 %, and the rest in the words of any language, of which 29 % were. None writes
    a pair that is kept for evaluation."""
    choose = random.Random(f"sums {seed}")
    sources = [source.problems(f"sums {seed}") for source in (FURTHER, SMALL)]
    problems = itertools.chain.from_iterable(zip(*sources, strict=False))
    found = []
    for problem in itertools.islice(problems, count):
        language = choose.choice(FURTHER.languages)
        numbers = [str(n) if choose.random() < DIGITS else spell(n, language) for n in problem.numbers]
        signs = [SIGNS[part] for part in problem.kind[1:]]
        source = numbers[0] + "".join(f" {sign} {number}" for sign, number in zip(signs, numbers[1:], strict=True))
        found.append({"source": source, "target": FURTHER.worked_answer(problem), "lang": language})
    return found


def further_sets(questions: int, benchmark_questions: int, sentences: int, data: Path) -> EvaluationSets:
    """As `evaluation_sets`, without MSVAMP's and MGSM's first questions, with {"hundred", "two_steps": generated problems with numbers
    up to 100, of one and of two steps; "msvamp_one": MSVAMP's questions that one operation answers}, answers worked place by place."""
    found = evaluation_sets(questions, benchmark_questions, sentences, data)
    found = {name: asked for name, asked in found.items() if name not in ("msvamp", "mgsm")}
    for name in ("held_out", "new_wording"):
        found[name] = [row | {"worked_answer": _worked(row["worked_answer"])} for row in found[name]]
    found["hundred"] = FurtherProblems((1,)).evaluation_problems(questions, 0)
    found["two_steps"] = TWO_STEPS.evaluation_problems(questions, 0)
    if (data / "msvamp").is_dir():
        found["msvamp_one"] = one_operation(data, benchmark_questions)
    return found


def _worked(equation: str) -> str:
    left, sign, right, _, result = equation.split()
    return place_by_place(int(left), sign, int(right), int(result))


def one_operation(data: Path, per_language: int) -> list[dict]:
    """MSVAMP's questions whose reference solution, its field "equation" in prefix notation, has one operator: 762 of 1000, the same in
    every language, of which so many are taken in equal steps."""
    with open(data / "msvamp" / "test_English.json", encoding="utf-8") as lines:
        equations = [json.loads(line)["equation"].split() for line in lines]
    ones = [index for index, equation in enumerate(equations) if sum(word in set("+-*/") for word in equation) == 1]
    chosen = set(ones[:: max(1, len(ones) // per_language)][:per_language])
    return [row | {"task": "msvamp_one"} for row in load_task("msvamp", data) if row["index"] in chosen]
