import itertools
import random
import re

import pytest

from layalign.train.demo.problems import HELD_OUT, TINY, patterns_held_out
from layalign.train.demo.tiny.corpus import english, hasty, multilingual
from layalign.train.demo.tiny.glosses import glosses, part_of
from layalign.train.demo.tiny.vocabulary import encoder_tokenizer
from layalign.train.demo.wording import spell, wording

LANGUAGES = TINY.languages
TRAINED = list(itertools.islice(TINY.problems("a test"), 1800))
ASKED = list(itertools.islice(TINY.problems("a test", HELD_OUT), 450))
SUM = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)\.")


def counted(language, number, noun):
    return wording(language).clause("{count}", (0, noun, 0), (number,))


def test_languages_are_eight_with_the_low_resource_ones_and_english():
    assert len(LANGUAGES) == 8
    assert {"en", "sw", "bn", "th"} <= set(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_numerals_differ_and_stand_in_the_text(language):
    numerals = {spell(number, language) for number in range(2, 100)}
    assert len(numerals) == 98
    nouns = range(len(wording(language).nouns))
    phrases = {counted(language, number, noun) for number in range(2, 100) for noun in nouns}
    assert len(phrases) == 98 * len(nouns)


@pytest.mark.parametrize("language", LANGUAGES)
def test_wordings_are_parallel(language):
    for part in ("names", "nouns", "containers", "openings", "groups", "gains", "losses", "questions"):
        assert len(getattr(wording(language), part)) == len(getattr(wording("en"), part)), part
    texts = [problem.text(language) for problem in TRAINED]
    assert not any(brace in text for text in texts for brace in "{}")
    # Two problems that differ in what they say differ in every language.
    assert len(set(texts)) == len({problem.text("en") for problem in TRAINED})


def test_grammar_of_numbers():
    assert counted("es", 21, 0) == "Veintiún bolígrafos"
    assert counted("es", 31, 0) == "Treinta y un bolígrafos"
    assert counted("fr", 21, 2) == "Vingt-et-une bananes"
    assert counted("fr", 21, 0) == "Vingt-et-un stylos"
    assert counted("zh", 2, 0) == "两支钢笔"
    assert counted("zh", 12, 0) == "十二支钢笔"
    boxes = [wording("sw").clause("{boxes}", (0, 0, container), (3, 4)) for container in range(4)]
    assert boxes == ["Masanduku matatu", "Mifuko mitatu", "Vikapu vitatu", "Pakiti tatu"]


def test_every_kind_comes_up_and_its_answer_is_right():
    assert {problem.kind for problem in TRAINED} == set(TINY.kinds) == {problem.kind for problem in ASKED}
    for problem in TRAINED + ASKED:
        sums = SUM.findall(TINY.worked_answer(problem))
        assert len(sums) == len(problem.steps)
        for left, sign, right, result in sums:
            assert {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign] == int(
                result
            )
            assert 0 < int(result) < 100
        assert TINY.worked_answer(problem).endswith(f"The answer is {sums[-1][3]}.")


def test_every_number_of_a_problem_is_used_once_and_written_in_it():
    for problem in TRAINED[:200]:
        text = problem.text("en").lower()
        assert all(re.search(rf"\b{spell(number, 'en')}\b", text) for number in problem.numbers)
        first, *rest = problem.steps
        assert [first[0], first[2], *(step[2] for step in rest)] == list(problem.numbers)


def test_held_out_patterns_and_numbers_are_in_no_training():
    seen_patterns = {(problem.kind, problem.clauses) for problem in TRAINED}
    seen_steps = {step[:3] for problem in TRAINED for step in problem.steps}
    for problem in ASKED:
        assert patterns_held_out(problem.kind, problem.clauses)
        assert (problem.kind, problem.clauses) not in seen_patterns
        assert all(TINY.pair_held_out(*pair) for pair in problem.pairs)
        assert not {step[:3] for step in problem.steps if step[1] != "*"} & seen_steps
    asked = {problem.steps[0][:3] for problem in ASKED if problem.kind == ("groups",)}
    trained = {problem.steps[0][:3] for problem in TRAINED if problem.kind == ("groups",)}
    assert asked and trained and not asked & trained


def test_a_sum_is_held_out_in_both_orders():
    assert all(
        TINY.pair_held_out(a, sign, b) == TINY.pair_held_out(b, sign, a)
        for a in range(50)
        for b in range(50)
        for sign in "+*"
    )


def test_each_clause_is_seen_in_training():
    for kind in TINY.kinds:
        for place in range(len(kind) + 1):
            assert {problem.clauses[place] for problem in TRAINED if problem.kind == kind} == {0, 1, 2}


def test_bases_read_nothing_that_is_held_out():
    texts = {problem.text("en") for problem in ASKED}
    for read, write in itertools.islice(english(0), 2000):
        assert not any(TINY.pair_held_out(int(a), sign, int(b)) for a, sign, b, _ in SUM.findall(write) if sign != "*")
        assert write not in texts and read.removesuffix(" Answer:") not in texts
    assert not texts & {part_of(problem, order, "en") for problem, order, _ in itertools.islice(multilingual(0), 2000)}


def test_hasty_notes_keep_every_number():
    choose = random.Random(0)
    for problem in TRAINED[:100]:
        note = hasty(problem.sentences("en"), choose).lower()
        assert all(re.search(rf"\b{spell(number, 'en')}\b", note) for number in problem.numbers)


def test_records_are_parallel_and_cover_each_language_with_each_kind():
    translation, task = TINY.translation_records(72, 0), TINY.task_records(72, 0)
    assert {(record["lang"], len(SUM.findall(record["target"]))) for record in task} >= {
        (language, steps) for language in LANGUAGES for steps in (1, 2)
    }
    for record in translation:
        assert record["source"] == record["target"] or record["lang"] != "en"
    evaluation = TINY.evaluation_problems(9, 0)
    assert len(evaluation) == 9 * len(LANGUAGES)
    by_language = {code: [row for row in evaluation if row["lang"] == code] for code in LANGUAGES}
    answers = [[row["answer"] for row in rows] for rows in by_language.values()]
    assert all(column == answers[0] for column in answers)


def test_a_seed_gives_the_same_records_and_another_seed_others():
    assert TINY.task_records(40, 3) == TINY.task_records(40, 3)
    assert TINY.task_records(40, 3) != TINY.task_records(40, 4)
    assert TINY.evaluation_problems(10, 3) == TINY.evaluation_problems(10, 3)
    assert TINY.evaluation_problems(10, 3) != TINY.evaluation_problems(10, 4)


def test_glosses_give_each_numeral_to_its_own_pieces():
    tokenizer = encoder_tokenizer((problem.text(code) for problem in TRAINED[:400] for code in LANGUAGES), 1600)
    problem = next(
        problem for problem in TRAINED if problem.kind == ("opening", "losses") and min(problem.numbers) > 20
    )
    # The question first: the glosses follow the order of the text.
    for language in LANGUAGES:
        ids, words = glosses(problem, (2, 1, 0), language, tokenizer)
        assert ids == tokenizer(part_of(problem, (2, 1, 0), language)).input_ids and len(ids) == len(words)
        found = [word for piece in words for word in piece]
        numerals = ["".join(pair) for pair in itertools.pairwise(found) if pair[1].startswith("-")]
        expected = [spell(number, "en") for number in reversed(problem.numbers)]
        assert numerals == [numeral for numeral in expected if "-" in numeral]
        name = wording("en").names[problem.name]["name"].lower()
        assert found.count(name) == part_of(problem, (2, 1, 0), "en").lower().count(name)
