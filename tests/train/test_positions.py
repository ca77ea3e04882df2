"""LLMs that look positions up in a table, which ends."""

import copy
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from layalign.train.recipe import Recipe
from layalign.train.settings import build
from layalign.train.stages import train


def test_a_record_of_more_positions_than_the_llm_has_is_named_before_anything_is_trained(settings, tmp_path):
    """The longest may come after days, and a run that has begun cannot be given shorter ones."""
    settings, llm = copy.deepcopy(settings), tmp_path / "llm"
    AutoTokenizer.from_pretrained(settings["llm"]).save_pretrained(llm)
    GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=24, n_embd=12, n_layer=2, bos_token_id=1)).save_pretrained(
        llm
    )
    settings["llm"], task = str(llm), settings["stages"]["task"]
    records = [*task["data"]["records"], {"source": "moja " * 20, "target": "one", "lang": "sw"}]
    task |= {"data": {"records": records}, "steps": 1}
    settings["stages"]["translation"]["steps"] = 1
    said = rf"stages.task: record {len(records) - 1} of {len(records)} \(counted from 0\) takes (\d+) positions of the LLM, which has 24"
    with pytest.raises(ValueError, match=said):
        train(build(Recipe, settings))
    assert not list(Path(settings["output"]).glob("*/checkpoint-*"))
    task["source_max_length"] = 5
    assert train(build(Recipe, settings)).history
