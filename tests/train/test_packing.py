"""Packed training: the batches, their resumption, and the same run as with padding."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from layalign.train.data.batches import EvaluationBatches, TokenBatches, divide
from layalign.train.data.collate import Collator, EncodedRecords, PackedCollator, Rows
from layalign.train.data.sampling import EpochSampler
from layalign.train.recipe import Recipe
from layalign.train.settings import build as build_settings
from layalign.train.stages import train

STEP, BUDGET = 16, 64


def skewed(count, seed=0):
    """Lengths as of real sentences: lognormal."""
    return np.random.default_rng(seed).lognormal(2, 0.8, count).astype(int).clip(1, 60)


def batches(lengths, processes, epochs=3, budget=BUDGET, seed=(0, 1)):
    order = EpochSampler(len(lengths), seed, 8)
    return TokenBatches(order, lengths, STEP, budget, processes, epochs)


def steps_of(sampler, processes):
    """For each step the calls of all processes."""
    found = list(sampler)
    assert len(found) == len(sampler)
    width = sampler.calls * processes
    return [found[start : start + width] for start in range(0, len(found), width)]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_call_fits_the_budget_and_every_step_has_its_examples(processes):
    lengths = skewed(100)
    sampler, alone = batches(lengths, processes), batches(lengths, 1)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        alone.set_epoch(epoch)
        order = list(EpochSampler(len(lengths), (0, 1), 8))
        steps = steps_of(sampler, processes)
        assert len(steps) == math.ceil(100 / STEP)
        for step, same in zip(steps, steps_of(alone, 1), strict=True):
            examples = sorted(index for call in step for index in call)
            assert examples == sorted(index for call in same for index in call)
            assert all(lengths[call].sum() <= BUDGET for call in step)
        assert [len(sorted(index for call in step for index in call)) for step in steps] == [STEP] * 6 + [4]
        assert sorted(index for step in steps for call in step for index in call) == sorted(order)


def test_the_number_of_calls_is_the_least():
    lengths = skewed(100)
    sampler = batches(lengths, 1)
    worst = 0
    for epoch in range(3):
        order = EpochSampler(len(lengths), (0, 1), 8)
        order.set_epoch(epoch)
        examples = np.array(list(order))
        for start in range(0, 100, STEP):
            tokens = lengths[examples[start : start + STEP]]
            fewest = next(
                calls
                for calls in range(1, STEP + 1)
                if max(tokens[part].sum() for part in divide(tokens, calls) if part) <= BUDGET
            )
            worst = max(worst, fewest)
    assert sampler.calls == worst > 1
    # Nine calls would have room for the tokens, but two such examples fit into none.
    assert batches(np.full(100, 33), 1).calls == 16 and batches(np.full(100, 33), 3).calls == 6


def test_epochs_differ_and_come_again():
    sampler = batches(skewed(100), 2)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(batches(skewed(100), 2, seed=(1, 1))) != first


def test_a_record_longer_than_the_budget_is_named():
    lengths = skewed(100)
    lengths[17] = 65
    with pytest.raises(
        ValueError, match=r"batch_tokens: record 17 of 100 .* takes 65 positions, more than 64; raise it to 65"
    ):
        batches(lengths, 1)


def test_parts_are_alike():
    tokens = skewed(128, seed=3)
    parts = divide(tokens, 8)
    sums = [tokens[part].sum() for part in parts]
    assert max(sums) - min(sums) <= tokens.max()
    assert sorted(index for part in parts for index in part) == list(range(128))
    assert divide(tokens[:2], 4) == [[0], [1], [], []] or divide(tokens[:2], 4) == [[1], [0], [], []]


@pytest.mark.parametrize("size, budget", [(3, 0), (None, BUDGET)])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_held_out_records_come_once_and_for_all_processes_alike(size, budget, processes):
    lengths = skewed(20)
    lengths[4] = 100  # longer than the budget: alone
    found = list(EvaluationBatches(lengths, processes, size, budget))
    assert len(found) % processes == 0
    assert [index for batch in found for index in batch] == list(range(20))
    if size is None:
        assert all(lengths[batch].sum() <= BUDGET or batch == [4] for batch in found)


def rows(arrays):
    begins = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int64)
    return Rows(np.concatenate(arrays).astype(np.int32), begins)


def test_collated_rows_lie_end_to_end():
    records = EncodedRecords(rows([[5, 6], [7], [8, 9, 10]]), rows([[1, 2, 3], [4, 5], [6]]), np.array([1, 2, 0]))
    packed = PackedCollator()([records[0], records[1], records[2]])
    assert packed["encoder_input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert packed["encoder_cu_seqlens"].tolist() == [0, 2, 3, 6]
    assert packed["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert packed["cu_seqlens"].tolist() == [0, 3, 5, 6]
    assert packed["labels"].tolist() == [[-100, 2, 3, -100, -100, 6]]
    assert packed["cu_seqlens"].dtype == packed["encoder_cu_seqlens"].dtype == torch.int32
    for collator in (PackedCollator(), Collator()):
        assert (collator([])["labels"] == -100).all()


@pytest.fixture
def uneven(bases, tmp_path):
    """(changes of both stages) -> the recipe of 60 records of very different lengths."""
    generator = np.random.default_rng(5)
    english = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    swahili = ["sifuri", "moja", "mbili", "tatu", "nne", "tano", "sita", "saba", "nane", "tisa"]
    records = []
    for length in generator.lognormal(1.2, 0.9, 60).astype(int).clip(1, 30):
        digits = generator.integers(10, size=length)
        source, target = (" ".join(words[digit] for digit in digits) for words in (swahili, english))
        records.append({"source": source, "target": target, "lang": "sw"})

    def make(name="run", both=None, **settings):
        stage = {"data": {"records": records}, "steps": 6, "learning_rate": 0.003, "log_steps": 1, "save_minutes": 0}
        stage |= {"hold_out": 12, "eval_steps": 3, **(both or {})}
        stages = {"translation": dict(stage), "task": {**stage, "prompt": "answer : {source}"}}
        values = {
            **bases,
            "output": str(tmp_path / name),
            "progress": False,
            "device": "cpu",
            "stages": stages,
            **settings,
        }
        return build_settings(Recipe, values)

    return make


def losses(history, kind="loss"):
    return np.array([entry[kind] for stage in ("translation", "task") for entry in history[stage] if kind in entry])


@pytest.mark.parametrize("changes", [{"encoder": None, "train_llm": True}, {"model": {"adapter": None}}])
def test_a_question_that_the_llm_does_not_read_takes_no_place_in_a_budget(settings, changes):
    """Of an LLM alone, or without an adapter. The longest record here has 11 positions of text, and a question of 5 tokens."""
    del settings["stages"]["translation"], settings["stages"]["task"]["batch_size"]
    settings["stages"]["task"] |= {"packing": True, "batch_tokens": 12, "global_batch_size": 4, "steps": 2}
    history = train(build_settings(Recipe, settings | changes)).history["task"]
    assert len([entry for entry in history if "loss" in entry]) == 2


def test_packed_with_a_batch_size_is_the_padded_run(uneven):
    """The same batches: losses, gradient norms and held-out losses to rounding."""
    padded = train(uneven("padded", {"batch_size": 8})).history
    packed = train(uneven("packed", {"batch_size": 8, "packing": True})).history
    for kind in ("loss", "grad_norm", "eval_loss"):
        np.testing.assert_allclose(losses(packed, kind), losses(padded, kind), rtol=2e-4)
    assert len(losses(packed, "eval_loss")) == 4


def test_by_tokens_it_is_the_run_of_the_same_global_batch(uneven):
    """Steps hold the same examples as of padded batches that divide them otherwise."""
    padded = train(uneven("padded", {"batch_size": 4, "global_batch_size": 16})).history
    tokens = {"packing": True, "batch_tokens": 200, "global_batch_size": 16}
    packed = train(uneven("packed", tokens)).history
    for kind in ("loss", "grad_norm", "eval_loss"):
        np.testing.assert_allclose(losses(packed, kind), losses(padded, kind), rtol=2e-4)


def test_held_out_loss_is_that_of_the_records(uneven):
    """Whatever they are batched with."""
    found = [
        losses(
            train(
                uneven(f"of_{size}", {"batch_size": 8, "steps": 1, "eval_steps": 1, "eval_batch_size": size})
            ).history,
            "eval_loss",
        )
        for size in (1, 5, 12)
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"precision": "bf16"}], ids=str)
def test_stopped_within_an_epoch_it_goes_on_bit_identical(uneven, options):
    """Epochs have three steps of two calls; what is interrupted goes on inside the second one."""
    tokens = {"packing": True, "batch_tokens": 200, "global_batch_size": 16, "save_steps": 1, **options}

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4 and args.output_dir not in stopped:
                stopped.append(args.output_dir)
                raise KeyboardInterrupt

    stopped = []
    whole, broken = uneven("whole", tokens), uneven("broken", tokens)
    expected = train(whole)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(broken, callbacks=[Stop()])
    found = train(broken)
    assert found.history == expected.history
    one, other = (load_file(f"{recipe.output}/model/model.safetensors") for recipe in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_many_steps_of_both_stages_are_the_same_curve(uneven, pytestconfig):
    """Apart no further than two padded runs that only round differently: one that accumulates two calls a step. Two hundred steps with
    --thorough."""
    steps = 200 if pytestconfig.getoption("thorough") else 80
    both = {"steps": steps, "eval_steps": steps // 2, "learning_rate": 0.001}
    padded = train(uneven("padded", both | {"batch_size": 8})).history
    halves = train(uneven("halves", both | {"batch_size": 4, "gradient_accumulation": 2})).history
    packed = train(uneven("packed", both | {"batch_size": 8, "packing": True})).history
    assert [len(losses(padded, kind)) for kind in ("loss", "eval_loss")] == [2 * steps, 4]

    def apart(other):
        return max(np.abs(losses(other, kind) - losses(padded, kind)).max() for kind in ("loss", "eval_loss"))

    assert apart(packed) <= 2 * apart(halves) + 1e-5
    assert losses(padded)[steps * 3 // 4 : steps].mean() < 0.8 * losses(padded)[:10].mean()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_interpreter")
def test_the_triton_kernels_train_on_packed_rows(settings):
    """In Triton's interpreter: a step of each stage, as with PyTorch's attention."""
    found = []
    for backend in ("torch", "triton"):
        for stage in settings["stages"].values():
            stage |= {"packing": True, "batch_size": 2, "steps": 1}
        changed = {"output": f"{settings['output']}-{backend}", "model": {"attention_backend": backend}}
        found.append(train(build_settings(Recipe, settings | changed)).history)
    for kind in ("loss", "grad_norm"):
        np.testing.assert_allclose(losses(found[1], kind), losses(found[0], kind), rtol=1e-4)


TOKENS = {"packing": True, "batch_tokens": 200, "global_batch_size": 16}


@pytest.mark.parametrize(
    "stage, settings, message",
    [
        (TOKENS | {"global_batch_size": None}, {}, "batch_tokens: needs global_batch_size"),
        (TOKENS | {"packing": False}, {}, "batch_tokens: counts the tokens of packed batches, but packing is not true"),
        (TOKENS | {"batch_size": 4}, {}, "batch_tokens: takes the place of batch_size, got 4; give one of them"),
        (TOKENS | {"length_grouped": True}, {}, "length_grouped: is about padding"),
        (TOKENS | {"gradient_accumulation": 2}, {}, "gradient_accumulation: follows from global_batch_size"),
        ({"packing": True}, {"model": {"published_training": True}}, "stages.translation.packing: published_training"),
        ({"packing": True}, {"model": {"mask_cross_padding": False}}, "packed batches have none"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(uneven, stage, settings, message):
    with pytest.raises(ValueError, match=message):
        uneven("wrong", stage, **settings)


def test_a_budget_too_small_ends_the_run_before_its_first_step(uneven):
    with pytest.raises(ValueError, match=r"batch_tokens: record \d+ of 48 .* more than 20; raise it to"):
        train(uneven("small", TOKENS | {"batch_tokens": 20}))
