"""The table of predicted goals: what it calls a prediction, what it compares, and what it says of kernels without public figures."""

import dataclasses

import pytest

from bench import predicted


@pytest.fixture
def by_share():
    goal = next(goal for goal in predicted.goals() if goal.title == "mix backward, states too")
    assert goal.share and goal.wanted == 0.75
    return goal


def row(seconds, yardstick, **other):
    return (
        dict(seconds=seconds, yardstick=yardstick, value=yardstick / seconds, limit="mix: memory", calibrated=True)
        | other
    )


def cells(goal, old, new):
    text = predicted.table({} if old is None else {goal.title: old}, {goal.title: new}, [goal])
    titles, _, values = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    assert all(
        title.startswith("predicted") for title in titles if title.endswith("us") and not title.startswith("yardstick")
    )
    return values[5:9] + values[10:]


def test_both_columns_are_against_the_same_yardstick(by_share):
    old = row(522e-6, 437e-6)  # which read everything twice, and counted that as work
    assert cells(by_share, old, row(287e-6, 265e-6)) == ["51%", "92%", "at least 75%", "predicted met", "yes"]
    assert cells(by_share, None, row(400e-6, 265e-6)) == ["-", "66%", "at least 75%", "predicted missed", "yes"]


def test_what_is_uncalibrated_or_left_to_the_library_says_so(by_share):
    new = row(287e-6, 265e-6, calibrated=False)
    assert cells(by_share, None, new)[-1] == "uncalibrated"
    library = dataclasses.replace(by_share, by_library=True)
    assert cells(library, None, new)[3] == "cuBLAS with auto; ours predicted met"
    ratio = dataclasses.replace(by_share, share=False, wanted=0.9)
    assert cells(ratio, None, row(1e-4, 1e-4, value=1.0))[1:4] == ["1.00x", "at most 0.90x", "predicted missed"]


def test_every_goal_has_a_title_of_its_own():
    titles = [goal.title for goal in predicted.goals()]
    assert len(set(titles)) == len(titles) and {goal.number for goal in predicted.goals()} == {3, 4, 5, 6, 7}
