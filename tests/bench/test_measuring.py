"""What one implementation does wrong costs its own row, whatever it does."""

import copy
import dataclasses

import pytest
import torch

from bench.cases.model import CASES, in_fp64
from bench.measuring import Effort, Missing, measure
from bench.model_suite import Compared, prefill, train
from bench.peers.model.published import Published

X = torch.arange(1.0, 9.0)
EFFORT = Effort(rounds=3, seconds=0.0, clock=iter(range(10000)).__next__)


class OutOfResources(Exception):
    """A plain one, as Triton's are."""


def right():
    return [2 * X]


def measured(like="published", **works):
    return measure(works, lambda: [2 * X.double()], like, torch.device("cpu"), EFFORT)


def raising(error):
    def work():
        raise error

    return work


def test_tritons_errors_are_plain_exceptions():
    errors = pytest.importorskip("triton.runtime.errors")
    assert not issubclass(errors.OutOfResources, (RuntimeError, ValueError))


@pytest.mark.parametrize(
    "error", [OutOfResources("shared memory"), AssertionError("D"), KeyError("x"), MemoryError()], ids=str
)
def test_any_error_costs_one_row(error):
    found = measured(published=right, ours=right, theirs=raising(error))
    assert found["theirs"].error.startswith(f"theirs fails: {type(error).__name__}: ") and not found["theirs"].seconds
    for name in ("published", "ours"):
        assert found[name].error is None and len(found[name].seconds) == EFFORT.rounds


def test_where_the_published_way_fails_the_best_of_the_others_measures():
    found = measured(published=raising(OutOfResources("no")), ours=right, other=right, wrong=lambda: [2.1 * X])
    assert found["published"].error and found["ours"].seconds and found["other"].seconds
    assert "wrong is wrong" in found["wrong"].error
    alone = measured(published=raising(OutOfResources("no")), ours=right)
    assert "cannot be judged" in alone["ours"].error and not alone["ours"].seconds


def test_a_broken_reference_measures_nobody():
    """Else what errs as much as the exact result itself would count as right."""
    works = {"published": right, "ours": right}
    found = measure(works, lambda: [5 * X.double()], "published", torch.device("cpu"), EFFORT)
    for name in works:
        assert found[name].error.startswith(f"{name} cannot be judged: published errs by 6.00e-01"), found[name].error
        assert not found[name].seconds


def test_an_error_in_a_later_round():
    calls = iter(range(100))

    def tires():
        if next(calls) == 2:
            raise OutOfResources("late")
        return right()

    found = measured(published=right, tires=tires, gone=Missing("absent"))
    assert "late" in found["tires"].error and not found["tires"].seconds
    assert len(found["published"].seconds) == EFFORT.rounds and found["gone"].missing == "absent"


def test_a_nan_is_wrong():
    assert "is wrong" in measured(published=right, ours=lambda: [2 * X + torch.tensor(torch.nan)])["ours"].error


SUITE = """
import os
import pytest, torch
from bench.measuring import CLOCK, Table, measure

def measure_toy(effort):
    with open(os.environ["TOY"], "a") as file:
        file.write("set up\\n")
    raise MemoryError("54 GB")

@pytest.mark.parametrize("name", ["plain", "ours", "late"])
@pytest.mark.benchmark(timer=CLOCK)
def test_toy(measured_once, effort, row, name):
    table = Table(suite="toy", case="8 numbers", yardstick="plain", dtype=torch.float32)
    row(table, name, measured_once(measure_toy, effort), ours=name == "ours")
"""


@pytest.mark.slow
def test_a_failing_set_up_is_run_once(run_bench, tmp_path, monkeypatch):
    """And every row of the table says why it has no figure, in the results too."""
    (tmp_path / "test_toy.py").write_text(SUITE)
    monkeypatch.setenv("TOY", str(tmp_path / "log"))
    arguments = [tmp_path / "test_toy.py", f"--rootdir={tmp_path}", "--record", tmp_path / "results"]
    done = run_bench(*arguments, plugins=(None, ["bench.conftest"]))
    assert (tmp_path / "log").read_text() == "set up\n"
    assert "3 failed" in done.stdout and done.stdout.count("54 GB") >= 3


@pytest.fixture
def ragged():
    return dataclasses.replace(CASES["training_step"]["gpu_llama_3_8b"].small(), device="cpu", ragged=True)


def generation(system):
    """Of given tokens: the cache is in use."""
    return system.forced(torch.arange(3, 11).view(2, 4), 4)


@pytest.mark.parametrize("call", [train, prefill, generation])
def test_fp64_a_layer_at_a_time(call, ragged):
    """The same bits as of a whole fp64 copy, and the layers' weights are those of the LLM before and after."""
    compared = Compared(ragged, training=call is train)
    found = compared.exact(call, eager=False)
    whole = copy.deepcopy(compared.llm).double()
    exact = Published(compared.encoder, whole, compared.batch, compared.trained.copied(torch.float64), eager=False)
    for got, want in zip(found, call(exact), strict=True):
        assert got.dtype == torch.float64 and torch.equal(got, want)
    llm = in_fp64(compared.llm)
    shared = zip(llm.model.layers.parameters(), compared.llm.model.layers.parameters(), strict=True)
    assert all(mine.data_ptr() == theirs.data_ptr() for mine, theirs in shared)
    assert llm.dtype == torch.float64 and compared.llm.dtype == torch.bfloat16


def test_no_layer_keeps_fp64_weights_for_the_backward(ragged):
    """On every device: a 7B LLM's would not fit a GPU, and no CPU would run what is a GPU's alone."""
    compared = Compared(ragged, training=True)
    weights = [weight.double() for weight in compared.llm.model.layers.parameters() if weight.ndim == 2]
    weights += [weight.t() for weight in weights]
    kept = []

    def keep(tensor):
        kept.append(any(tensor.shape == weight.shape and torch.equal(tensor, weight) for weight in weights))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compared.exact(train, eager=False)
    assert kept and not any(kept)
