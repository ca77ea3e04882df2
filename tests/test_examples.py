"""The examples for models of one's own, with fewer steps than a reader takes; tests/generation runs the one that serves."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


# Chance is 0.25 of four quarters, 0.125 of eight answers, 0.00001 of a hundred thousand sources.
@pytest.mark.parametrize(
    ("name", "steps", "least"), [("image_states", 60, 0.6), ("retrieved_documents", 60, 0.3), ("own_model", 60, 0.9)]
)
def test_it_learns(name, steps, least, capsys):
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert module.main(steps) > least
    assert "right" in capsys.readouterr().out
