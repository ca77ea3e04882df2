"""Mixing by language: how many of each an epoch has, in an order that depends on nothing but seed and epoch."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from layalign.train.data.mixing import mixed, mixture
from layalign.train.data.sampling import EpochSampler
from layalign.train.recipe import Recipe
from layalign.train.settings import build
from layalign.train.stages import train

NAMES = ["sw", "de", "fr"]
LANGUAGES = np.repeat(np.array([0, 1, 2], np.uint16), [10, 100, 890])


def counts(mixing, languages=LANGUAGES):
    return mixture(mixing, languages, NAMES, "task").counts.tolist()


def test_shares_of_an_epoch():
    assert counts({"temperature": 1}) == [10, 100, 890]
    assert counts({"temperature": 0}) == [334, 333, 333]
    # n^0.3: 1.995, 3.981, 7.670
    assert counts({"temperature": 0.3}) == [146, 292, 562]
    assert counts({"sw": 2, "de": 1, "fr": 1}) == [500, 250, 250]
    assert counts({"sw": 2.0, "de": 1.0, "fr": 0}) == [73, 37, 0]
    assert counts({"sw": 1e-9, "de": 1, "fr": 0}) == [1, 110, 0], "a language that is asked for is there"


def test_over_epochs_every_record_is_seen_equally_often():
    mix = mixture({"temperature": 0.3}, LANGUAGES, NAMES, "task")
    seen = np.zeros(len(LANGUAGES), int)
    for epoch in range(7):
        order = mixed(mix, (3, 4), epoch)
        assert np.bincount(LANGUAGES[order]).tolist() == mix.counts.tolist()
        seen += np.bincount(order, minlength=len(seen))
        for language in range(3):
            of_language = seen[np.flatnonzero(np.equal(LANGUAGES, language))]
            assert of_language.max() - of_language.min() <= 1
        first = order[LANGUAGES[order] == 2]
        assert len(set(first.tolist())) == len(first) or epoch, "no record twice before all were seen"


def test_the_order_is_a_function_of_seed_and_epoch():
    mix = mixture({"temperature": 0.3}, LANGUAGES, NAMES, "task")
    lengths = np.arange(len(LANGUAGES)) % 37
    for given in (None, lengths):
        sampler = EpochSampler(len(LANGUAGES), (3, 4), 8, given, mix)
        orders = []
        for epoch in (0, 1, 2, 1):
            sampler.set_epoch(epoch)
            orders.append(list(sampler))
            assert len(orders[-1]) == len(sampler) == mix.counts.sum()
        assert orders[1] == orders[3] != orders[2]
        other = EpochSampler(len(LANGUAGES), (3, 5), 8, given, mix)
        assert list(other) != orders[0]
    # Shuffled: the rare language is not all at the beginning.
    assert np.flatnonzero(LANGUAGES[orders[0]] == 0).mean() > 100


def test_languages_are_called_as_in_sources(recipe_file):
    values = yaml.safe_load(recipe_file.read_text())
    values["stages"]["task"]["mixing"] = {"swh_Latn": 2, "yor_Latn": 1, "German": 0}
    assert build(Recipe, values).stages["task"].mixing == {"sw": 2, "yor_latn": 1, "de": 0}
    values["stages"]["task"]["mixing"] = {"temperature": 0.5}
    assert build(Recipe, values).stages["task"].mixing == {"temperature": 0.5}


@pytest.mark.parametrize(
    ("mixing", "message"),
    [
        ({"sw": 1, "de": 1, "fr": 1, "th": 1}, "stages.task.mixing: no records of th; there are sw, de, fr"),
        ({"sw": 1, "de": 1}, "stages.task.mixing: no weight for fr, of which there are records; 0 leaves one out"),
    ],
)
def test_languages_that_do_not_fit_the_data(mixing, message):
    with pytest.raises(ValueError) as caught:
        counts(mixing)
    assert message in str(caught.value)


def test_records_without_a_language_are_told_of():
    with pytest.raises(ValueError, match=r"no weight for no language \(''\)"):
        mixture({"sw": 1.0}, np.array([0, 1]), ["sw", ""], "task")


def test_a_run_interrupted_within_a_mixed_epoch_ends_bit_identical(settings, records):
    for place, record in enumerate(records):
        record["lang"] = ("sw", "de")[place > 1]
    del settings["stages"]["translation"]
    settings["stages"]["task"] |= {"mixing": {"sw": 2, "de": 1}, "steps": 14, "batch_size": 2, "save_steps": 3}

    def run(output, stop=None):
        recipe = build(Recipe, {**settings, "output": str(Path(settings["output"]) / output)})
        history = train(recipe, callbacks=[] if stop is None else [stop]).history
        return history, (Path(recipe.output) / "model" / "model.safetensors").read_bytes(), recipe

    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 10:
                raise KeyboardInterrupt

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", Stop())
    resumed = run("stopped")
    assert resumed[:2] == whole[:2]
    told = json.loads((Path(whole[2].output) / "task" / "mixing.json").read_text())
    assert told == {"sw": {"records": 2, "epoch": 7}, "de": {"records": 8, "epoch": 3}}
    # 14 steps of 2 are 2 epochs and 8 of 10; without mixing the losses are others.
    settings["stages"]["task"]["mixing"] = None
    assert run("plain")[0] != whole[0]
