import itertools
import random
import re

import pytest

from layalign.train.demo.base_glosses import glosses, part_of
from layalign.train.demo.base_text import english, hasty, multilingual
from layalign.train.demo.base_tokenizers import encoder_tokenizer
from layalign.train.demo.problems import (
    KINDS,
    LANGUAGES,
    evaluation_problems,
    numbers_held_out,
    pair_held_out,
    problems,
    task_records,
    template_held_out,
    translation_records,
)
from layalign.train.demo.templates import WORDINGS
from layalign.train.demo.wording import spell

TRAINING = list(itertools.islice(problems("a test"), 1800))
HELD_OUT = list(itertools.islice(problems("a test", held_out=True), 450))
SUM = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)\.")


def counted(wording, number, noun):
    return wording.clause("{count}", 0, noun, 0, (number,))


def test_languages_are_eight_with_the_low_resource_ones_and_english():
    assert len(LANGUAGES) == 8
    assert {"en", "sw", "bn", "th"} <= set(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_numerals_differ_and_stand_in_the_text(language):
    numerals = {spell(number, language) for number in range(2, 100)}
    assert len(numerals) == 98
    wording = WORDINGS[language]
    phrases = {counted(wording, number, noun) for number in range(2, 100) for noun in range(len(wording.nouns))}
    assert len(phrases) == 98 * len(wording.nouns)


@pytest.mark.parametrize("language", LANGUAGES)
def test_wordings_are_parallel(language):
    wording, english_wording = WORDINGS[language], WORDINGS["en"]
    for part in ("names", "nouns", "containers", "openings", "groups", "gains", "losses", "questions"):
        assert len(getattr(wording, part)) == len(getattr(english_wording, part)), part
    texts = [problem.text(language) for problem in TRAINING]
    assert not any(brace in text for text in texts for brace in "{}")
    # Two problems that differ in what they say differ in every language.
    assert len(set(texts)) == len({problem.text("en") for problem in TRAINING})


def test_grammar_of_numbers():
    spanish, french, chinese, swahili = (WORDINGS[code] for code in ("es", "fr", "zh", "sw"))
    assert counted(spanish, 21, 0) == "Veintiún bolígrafos"
    assert counted(spanish, 31, 0) == "Treinta y un bolígrafos"
    assert counted(french, 21, 2) == "Vingt-et-une bananes"
    assert counted(french, 21, 0) == "Vingt-et-un stylos"
    assert counted(chinese, 2, 0) == "两支钢笔"
    assert counted(chinese, 12, 0) == "十二支钢笔"
    boxes = [swahili.clause("{boxes}", 0, 0, container, (3, 4)) for container in range(4)]
    assert boxes == ["Masanduku matatu", "Mifuko mitatu", "Vikapu vitatu", "Pakiti tatu"]


def test_every_kind_comes_up_and_its_answer_is_right():
    assert {problem.kind for problem in TRAINING} == set(KINDS) == {problem.kind for problem in HELD_OUT}
    for problem in TRAINING + HELD_OUT:
        sums = SUM.findall(problem.worked_answer)
        assert len(sums) == len(problem.steps)
        for left, sign, right, result in sums:
            assert {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign] == int(
                result
            )
            assert 0 < int(result) < 100
        assert problem.worked_answer.endswith(f"The answer is {sums[-1][3]}.")


def test_every_number_of_a_problem_is_used_once_and_written_in_it():
    for problem in TRAINING[:200]:
        text = problem.text("en").lower()
        assert all(re.search(rf"\b{spell(number, 'en')}\b", text) for number in problem.numbers)
        first, *rest = problem.steps
        assert [first[0], first[2], *(step[2] for step in rest)] == list(problem.numbers)


def test_held_out_templates_and_numbers_are_in_no_training():
    seen_templates = {(problem.kind, problem.clauses) for problem in TRAINING}
    seen_steps = {step[:3] for problem in TRAINING for step in problem.steps}
    for problem in HELD_OUT:
        assert template_held_out(problem.kind, problem.clauses)
        assert (problem.kind, problem.clauses) not in seen_templates
        assert numbers_held_out(problem)
        assert not {step[:3] for step in problem.steps if step[1] != "*"} & seen_steps
    asked = {problem.steps[0][:3] for problem in HELD_OUT if problem.kind == ("groups",)}
    trained = {problem.steps[0][:3] for problem in TRAINING if problem.kind == ("groups",)}
    assert asked and trained and not asked & trained


def test_a_sum_is_held_out_in_both_orders():
    assert all(
        pair_held_out(a, sign, b) == pair_held_out(b, sign, a) for a in range(50) for b in range(50) for sign in "+*"
    )


def test_each_clause_is_seen_in_training():
    for kind in KINDS:
        for place in range(len(kind) + 1):
            assert {problem.clauses[place] for problem in TRAINING if problem.kind == kind} == {0, 1, 2}


def test_bases_read_nothing_that_is_held_out():
    texts = {problem.text("en") for problem in HELD_OUT}
    for read, write in itertools.islice(english(0), 2000):
        assert not any(pair_held_out(int(a), sign, int(b)) for a, sign, b, _ in SUM.findall(write) if sign != "*")
        assert write not in texts and read.removesuffix(" Answer:") not in texts
    assert not texts & {part_of(problem, order, "en") for problem, order, _ in itertools.islice(multilingual(0), 2000)}


def test_hasty_notes_keep_every_number():
    choose = random.Random(0)
    for problem in TRAINING[:100]:
        note = hasty(problem.sentences("en"), choose).lower()
        assert all(re.search(rf"\b{spell(number, 'en')}\b", note) for number in problem.numbers)


def test_records_are_parallel_and_cover_each_language_with_each_kind():
    translation, task = translation_records(72, 0), task_records(72, 0)
    assert {(record["lang"], len(SUM.findall(record["target"]))) for record in task} >= {
        (language, steps) for language in LANGUAGES for steps in (1, 2)
    }
    for record in translation:
        assert record["source"] == record["target"] or record["lang"] != "en"
    evaluation = evaluation_problems(9, 0)
    assert len(evaluation) == 9 * len(LANGUAGES)
    by_language = {code: [row for row in evaluation if row["lang"] == code] for code in LANGUAGES}
    answers = [[row["answer"] for row in rows] for rows in by_language.values()]
    assert all(column == answers[0] for column in answers)


def test_a_seed_gives_the_same_records_and_another_seed_others():
    assert task_records(40, 3) == task_records(40, 3)
    assert task_records(40, 3) != task_records(40, 4)
    assert evaluation_problems(10, 3) == evaluation_problems(10, 3)
    assert evaluation_problems(10, 3) != evaluation_problems(10, 4)


def test_glosses_give_each_numeral_to_its_own_pieces():
    tokenizer = encoder_tokenizer((problem.text(code) for problem in TRAINING[:400] for code in LANGUAGES), 1600)
    problem = next(
        problem for problem in TRAINING if problem.kind == ("opening", "losses") and min(problem.numbers) > 20
    )
    # The question first: the glosses follow the order of the text.
    for language in LANGUAGES:
        ids, words = glosses(problem, (2, 1, 0), language, tokenizer)
        assert ids == tokenizer(part_of(problem, (2, 1, 0), language)).input_ids and len(ids) == len(words)
        found = [word for piece in words for word in piece]
        numerals = ["".join(pair) for pair in itertools.pairwise(found) if pair[1].startswith("-")]
        expected = [spell(number, "en") for number in reversed(problem.numbers)]
        assert numerals == [numeral for numeral in expected if "-" in numeral]
        name = WORDINGS["en"].names[problem.name]["name"].lower()
        assert found.count(name) == part_of(problem, (2, 1, 0), "en").lower().count(name)
