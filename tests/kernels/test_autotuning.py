"""Autotuning without a GPU: the timer is stubbed, the store is real."""

import json
import multiprocessing

import pytest
import torch
import triton

from layalign.kernels import autotuning
from layalign.kernels.launch import LaunchConfig

SMALL, MIDDLE, LARGE = (LaunchConfig(block_m=size, block_n=64, warps=4, stages=2) for size in (32, 64, 128))
MILLISECONDS = {SMALL: 3.0, MIDDLE: 1.0, LARGE: 2.0}
KEY = {"head_dim": 64, "dtype": "float16"}


@pytest.fixture(autouse=True)
def store(monkeypatch, tmp_path):
    """The store's path; nothing is known yet, and a configuration "takes" what MILLISECONDS says."""
    monkeypatch.setenv("LAYALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200/x")
    monkeypatch.setattr(autotuning, "_known", {})
    monkeypatch.setattr(triton.testing, "do_bench", lambda run, return_mode: MILLISECONDS[run()])
    return tmp_path / "autotuning" / f"NVIDIA-H200-x-triton-{triton.__version__}.json"


def forget():
    autotuning._known.clear()


def never(config):
    raise AssertionError("timed again")


def test_the_fastest_is_stored_and_stays(store):
    run = [].append
    assert autotuning.tuned("forward", KEY, [SMALL, MIDDLE, LARGE], lambda config: run(config) or config) == MIDDLE
    assert list(json.loads(store.read_text()).values()) == [
        {"block_m": 64, "block_n": 64, "warps": 4, "stages": 2, "descriptors": False, "ahead": False, "block_k": 0}
    ]
    assert autotuning.tuned("forward", KEY, [SMALL, MIDDLE, LARGE], never) == MIDDLE
    forget()
    assert autotuning.tuned("forward", dict(reversed(KEY.items())), [SMALL, MIDDLE, LARGE], never) == MIDDLE
    assert [path.name for path in store.parent.iterdir() if path.suffix not in (".json", ".lock")] == []


def test_another_kernel_or_key_is_another_choice(store):
    autotuning.tuned("forward", KEY, [SMALL, MIDDLE], lambda config: config)
    assert autotuning.tuned("backward", KEY, [SMALL, LARGE], lambda config: config) == LARGE
    assert autotuning.tuned("forward", {**KEY, "head_dim": 128}, [SMALL], lambda config: config) == SMALL
    assert len(json.loads(store.read_text())) == 3


def test_what_does_not_fit_is_skipped():
    def run(config):
        if config is MIDDLE:
            raise triton.OutOfResources(300_000, 232_448, "shared memory")
        return config

    assert autotuning.tuned("forward", KEY, [SMALL, MIDDLE, LARGE], run) == LARGE
    with pytest.raises(triton.OutOfResources, match="shared memory, Required: 300000"):
        autotuning.tuned("backward", KEY, [MIDDLE], run)


def test_a_choice_that_is_no_candidate_any_more_is_made_again(store):
    autotuning.tuned("forward", KEY, [SMALL, MIDDLE], lambda config: config)
    forget()
    assert autotuning.tuned("forward", KEY, [SMALL, LARGE], lambda config: config) == LARGE
    forget()
    assert autotuning.tuned("forward", KEY, [SMALL, LARGE], never) == LARGE


def test_the_first_of_two_that_tune_at_once_wins(monkeypatch):
    def while_timing(config):
        monkeypatch.setattr(triton.testing, "do_bench", lambda run, return_mode: run().block_m)
        autotuning.tuned("forward", KEY, [SMALL, MIDDLE], lambda config: config)
        forget()
        return config

    assert autotuning.tuned("forward", KEY, [MIDDLE, SMALL], while_timing) == SMALL


def _tune(folder, number):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAYALIGN_CACHE", folder)
        patch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200/x")
        patch.setattr(triton.testing, "do_bench", lambda run, return_mode: MILLISECONDS[run()])
        for index in range(20):
            autotuning.tuned("forward", {"process": number, "index": index}, [SMALL, MIDDLE], lambda config: config)


def test_processes_that_tune_at_once_lose_nothing(store, tmp_path):
    spawn = multiprocessing.get_context("fork")
    processes = [spawn.Process(target=_tune, args=(str(tmp_path), number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(json.loads(store.read_text())) == 80


@pytest.mark.parametrize("content", ["", "[]", '{"forward {}": 3}', '{"forward {}": {"block_m": 64}}', '{"forw'])
def test_a_corrupt_store_is_named(store, content):
    store.parent.mkdir()
    store.write_text(content)
    with pytest.raises(ValueError, match=f"{store.name}: not a store of autotuned launches.*delete it"):
        autotuning.tuned("forward", KEY, [SMALL], lambda config: config)
    assert store.read_text() == content


def test_only_where_asked_for(monkeypatch):
    for value, asked in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("LAYALIGN_AUTOTUNE", value)
        assert autotuning.enabled() is asked
    monkeypatch.delenv("LAYALIGN_AUTOTUNE")
    assert not autotuning.enabled()
