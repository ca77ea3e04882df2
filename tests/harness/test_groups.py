"""The harness's groups of our tasks: their mean is the average that `layalign evaluate` and the paper speak of."""

from pathlib import Path

import pytest
import yaml

pytest.importorskip("lm_eval")

from layalign.harness import TASKS
from layalign.languages import MATHEMATICS_GROUPS, XCSQA_GROUPS

GROUPS = {
    "mgsm": MATHEMATICS_GROUPS,
    "msvamp": MATHEMATICS_GROUPS,
    "xcsqa": XCSQA_GROUPS,
    "xcsqa_choices": XCSQA_GROUPS,
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_groups_mean_is_the_papers_average(name):
    """MGSM's Telugu is a task, and in no average."""
    group = yaml.safe_load((Path(TASKS) / f"{name}.yaml").read_text(encoding="utf-8"))
    assert [task.rpartition("_")[2] for task in group["task"]] == list(GROUPS[name]["avg"])
