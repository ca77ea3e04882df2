"""Intervals and paired comparisons by bootstrap, against slow draws, known answers and what chance allows."""

import json
import random

import numpy as np
import pytest

from layalign.evaluation.comparison import compare, comparison_table, intervals
from layalign.languages import MATHEMATICS_GROUPS, XNLI_GROUPS
from layalign.tasks.choices import Choices
from layalign.tasks.translations import Translations
from layalign.tasks.word_problems import SCORING

LANGUAGES = ("sw", "bn", "de", "te")


def run(right, languages=LANGUAGES, count=40, seed=0):
    """Records whose answers are right with the chance `right`, a float or {lang: float}."""
    draw = random.Random(seed)
    records = []
    for lang in languages:
        chance = right[lang] if isinstance(right, dict) else right
        for index in range(count):
            said = "7" if draw.random() < chance else "8"
            problem = {"task": "mgsm", "lang": lang, "index": index, "question": f"{lang} {index}", "answer": 7}
            records.append({**problem, "prediction": said, **SCORING.fields(said, 7)})
    return records


def test_intervals_are_the_percentiles_of_slow_draws():
    records = run({"sw": 0.3, "bn": 0.5, "de": 0.9, "te": 0.5})
    found = intervals(records, SCORING, draws=200, seed=3)["strict"]
    counts = np.random.default_rng([3, 40]).multinomial(40, [1 / 40] * 40, size=200)
    scores = {lang: [] for lang in LANGUAGES}
    for draw in counts:
        for lang in LANGUAGES:
            of_language = [record for record in records if record["lang"] == lang]
            drawn = [of_language[index] for index in range(40) for _ in range(draw[index])]
            scores[lang].append(SCORING.scores(drawn)["strict"][lang])
    expected = scores | {
        "avg": np.mean([scores[lang] for lang in ("bn", "sw", "de")], axis=0),
        "lrl": np.mean([scores[lang] for lang in ("bn", "sw")], axis=0),
        "hrl": scores["de"],
    }
    assert list(found) == ["avg", "lrl", "hrl", "bn", "sw", "de", "te"]
    for name, values in expected.items():
        assert found[name] == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist()), name


def test_intervals_hold_the_score_repeat_and_narrow_with_questions():
    few, many = run(0.5, ["sw"], 50), run(0.5, ["sw"], 800)
    assert intervals(few, SCORING) == intervals(few, SCORING)
    assert intervals(many, SCORING, seed=1) != intervals(many, SCORING)
    for records in (few, many):
        low, high = intervals(records, SCORING)["strict"]["sw"]
        assert low < SCORING.scores(records)["strict"]["sw"] < high
    width = [high - low for low, high in (intervals(records, SCORING)["strict"]["sw"] for records in (few, many))]
    assert width[0] / width[1] == pytest.approx(4, rel=0.15)  # the root of 16
    assert width[0] == pytest.approx(2 * 1.96 * 100 * (0.25 / 50) ** 0.5, rel=0.15)


def test_the_order_of_the_records_changes_nothing():
    records = run(0.5)
    shuffled = records[::-1]
    assert intervals(records, SCORING) == intervals(shuffled, SCORING)


def test_languages_share_their_questions():
    """Where all languages answer alike their average is as unsure as each; were they drawn apart it would look surer."""
    one = run(0.5, ["sw"], 100)
    records = [record | {"lang": lang} for lang in ("sw", "bn", "th", "de") for record in one]
    found = intervals(records, SCORING)["strict"]
    assert found["avg"] == pytest.approx(found["sw"])
    assert found["sw"] == found["de"]
    assert found["sw"][1] - found["sw"][0] > 15


def test_all_right_has_no_width_and_nothing_no_intervals():
    assert intervals(run(1.0), SCORING)["official"]["sw"] == [100.0, 100.0]
    assert intervals([], SCORING) == {}

    class Alone:
        """A scoring without statistics."""

        def fields(self, prediction, answer):
            return {}

        def scores(self, records):
            return {}

    assert intervals(run(0.5), Alone()) == {}
    with pytest.raises(ValueError, match="scoring: Alone has no statistics"):
        compare(run(0.5), run(0.5), Alone())


def test_intervals_of_translations_and_choices():
    sentences = [
        "trains stop here today",
        "it rained for a week",
        "she sold three goats there",
        "no one knew why it was",
    ]
    said = ["trains stop here today", "it rained for week", "she sold goats there", "nobody knew why"]
    records = [
        {"task": "flores", "lang": "sw", "index": index, "prediction": prediction, "answer": answer}
        for index, (prediction, answer) in enumerate(zip(said, sentences, strict=True))
    ]
    found = intervals(records, Translations(), {"avg": ("sw",)}, draws=100)
    for name, scores in Translations().scores(records).items():
        low, high = found[name]["sw"]
        assert low < scores["sw"] < high
    choices = [
        record | {"choices": ["7", "8"], "loglikelihoods": [-1.0, -2.0 + index % 3]}
        for index, record in enumerate(run(0.5, ["sw"]))
    ]
    assert list(intervals(choices, Choices(), XNLI_GROUPS)) == ["official", "loglikelihood", "loglikelihood_per_byte"]


def test_a_run_against_itself_differs_in_nothing():
    records = run(0.5)
    found = compare(records, records[::-1], SCORING)
    for scores in found["scores"].values():
        for name, difference in scores.items():
            assert (difference["difference"], difference["low"], difference["high"], difference["p"]) == (0, 0, 0, 1), (
                name
            )
    assert found["left_out"] == []


def test_a_better_run_is_found_and_pairs_are_surer_than_runs_apart():
    a = run(0.5, seed=1)
    b = [dict(record) for record in a]
    for record in b:  # of every fifth question the second run knows less
        if record["index"] % 5 == 0:
            record.update(SCORING.fields("8", 7))
    found = compare(a, b, SCORING)["scores"]["strict"]
    assert list(found) == ["avg", "lrl", "hrl", "bn", "sw", "de", "te"]
    scores_a, scores_b = SCORING.scores(a)["strict"], SCORING.scores(b)["strict"]
    for lang in LANGUAGES:
        assert (found[lang]["a"], found[lang]["b"]) == (scores_a[lang], scores_b[lang])
        assert found[lang]["difference"] == pytest.approx(scores_a[lang] - scores_b[lang])
        assert found[lang]["low"] <= found[lang]["difference"] <= found[lang]["high"]
    assert found["avg"]["p"] < 0.01
    assert found["avg"]["low"] > 0
    assert compare(b, a, SCORING)["scores"]["strict"]["avg"]["difference"] == -found["avg"]["difference"]
    ends = intervals(a, SCORING)["strict"]["avg"]
    assert found["avg"]["high"] - found["avg"]["low"] < ends[1] - ends[0]


def test_chance_is_seldom_called_a_difference():
    """Two runs of the same skill: p below 0.05 in about one of twenty, seeded."""
    below = 0
    for seed in range(200):
        a, b = (run(0.5, ["sw"], 100, seed=number) for number in (2 * seed, 2 * seed + 1))
        below += compare(a, b, SCORING, draws=200)["scores"]["strict"]["sw"]["p"] < 0.05
    assert 3 <= below <= 20


def test_p_and_the_interval_tell_the_same():
    for seed in range(40):
        a, b = run(0.6, ["sw"], 60, seed=seed), run(0.45, ["sw"], 60, seed=1000 + seed)
        found = compare(a, b, SCORING)["scores"]["official"]["sw"]
        if not 0.03 < found["p"] < 0.07:
            assert (found["p"] < 0.05) == (found["low"] > 0 or found["high"] < 0)


CHANGES = {
    "a question less": (
        lambda records: records[:-1],
        "mgsm, te, question 39 is not in the second run .1 of 160 are not.; takes two runs on the same problems",
    ),
    "a question more": (
        lambda records: [*records, records[-1] | {"index": 40}],
        "mgsm, te, question 40 is not in the first run",
    ),
    "another language": (
        lambda records: [record | {"lang": record["lang"].replace("te", "th")} for record in records],
        "mgsm, te, question 0 is not in the second run .40 of 160",
    ),
    "another question": (
        lambda records: [records[0] | {"question": "other"}, *records[1:]],
        "mgsm, sw, question 0: question is 'sw 0' in the first run and 'other' in the second",
    ),
    "another answer": (
        lambda records: [records[0] | {"answer": 9}, *records[1:]],
        "mgsm, sw, question 0: answer is 7 in the first run and 9 in the second",
    ),
    "another task": (
        lambda records: [record | {"task": "msvamp"} for record in records],
        "mgsm, sw, question 0: task is 'mgsm' in the first run and 'msvamp' in the second",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_runs_on_other_problems_are_refused_by_name(case):
    change, said = CHANGES[case]
    with pytest.raises(ValueError, match=said):
        compare(run(0.5), change(run(0.5)), SCORING)


def test_no_records_and_no_draws_are_refused():
    with pytest.raises(ValueError, match="runs: got no records"):
        compare([], [], SCORING)
    for draws in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"draws: got .*, takes a positive int"):
            intervals(run(0.5), SCORING, draws=draws)


def test_a_scorer_that_only_one_run_has_is_left_out_by_name():
    b = [record | {"choices": ["7", "8"]} for record in run(0.5)]
    a = [record | {"loglikelihoods": [0.0, -1.0]} for record in b]
    found = compare(a, b, Choices())
    assert list(found["scores"]) == ["official"]
    assert found["left_out"] == ["loglikelihood", "loglikelihood_per_byte"]
    assert "Only one of the runs has the scorer loglikelihood, loglikelihood_per_byte." in comparison_table(found)


def test_the_table():
    found = compare(run(0.9), run(0.1), SCORING, MATHEMATICS_GROUPS)
    json.dumps(found)
    lines = comparison_table(found, "LayAlign", "the LLM alone", title="mgsm").splitlines()
    assert lines[:4] == [
        "## mgsm",
        "",
        "| official scorer | LayAlign | the LLM alone | difference | 95 % interval | p |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    average = found["scores"]["official"]["avg"]
    assert lines[4] == (
        f"| Avg. | {average['a']:.1f} | {average['b']:.1f} | {average['difference']:+.1f} | {average['low']:+.1f} to "
        f"{average['high']:+.1f} | {average['p']:.3f} |"
    )
    assert "| strict scorer | LayAlign | the LLM alone | difference | 95 % interval | p |" in lines
    assert lines[-1] == "Paired bootstrap, 1000 draws of the questions; p is of each row alone."
