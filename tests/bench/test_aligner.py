"""What a measurement is: only what is right gets a figure, by rounds, with the memory that a call takes."""

from functools import partial

import torch

from bench.measuring import Effort, Measurement, Missing, measure
from bench.memory import peak_bytes, saved_bytes


def test_what_is_wrong_gets_no_figure():
    exact = torch.arange(1.0, 9.0, dtype=torch.float64)

    def work(error):
        return [exact.float() + error * torch.tensor([0.0] * 7 + [1.0])]

    def broken():
        raise ValueError("no such tile")

    errors = {"plain": 1e-6, "right": 1.5e-6, "wrong": 1e-4, "nothing": torch.nan}
    works = {name: partial(work, error) for name, error in errors.items()} | {"copy": lambda: None, "broken": broken}
    works["missing"] = Missing("not here")
    effort = Effort(rounds=3, seconds=0.0, clock=iter(range(1000)).__next__)
    found = measure(works, lambda: [exact], "plain", torch.device("cpu"), effort)
    timed = {name for name, measurement in found.items() if measurement.seconds}
    assert timed == {"plain", "right", "copy"} and all(found[name].seconds == [1] * 3 for name in timed)
    assert "wrong is wrong: relative error" in found["wrong"].error and "no such tile" in found["broken"].error
    assert found["missing"].missing == "not here" and found["missing"].error is None
    lenient = measure(works, lambda: [exact], "plain", torch.device("cpu"), effort, roundings=1000)
    assert lenient["wrong"].error is None


def test_inputs_take_turns():
    """The first is checked as well."""
    calls = []
    works = {"both": [partial(calls.append, 1), partial(calls.append, 2)]}
    effort = Effort(rounds=4, seconds=0.0, clock=iter(range(1000)).__next__)
    measure(works, list, "both", torch.device("cpu"), effort)
    assert calls == [1, 1, 2, 1, 2]


def test_ratios_are_those_of_rounds():
    """A machine that is slow in one round is slow for all."""
    ours, theirs = Measurement([1, 10, 2]), Measurement([2, 20, 4])
    assert ours.ratio_to(theirs) == 0.5 and ours.median() == 2


def test_saved_bytes_are_allocations_that_were_not_given():
    x, weight = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4)

    def function():
        y = (x @ weight).exp()  # keeps the weight, which was given, and y
        return y[:2] * y[:2]  # keeps a view of y twice

    assert saved_bytes(function, [x, weight]) == 8 * 4 * 4


def test_peak_bytes_of_a_call():
    """What was there before does not count, and what is released makes room."""
    x = torch.randn(1000)

    def work():
        for _ in range(3):
            y = x.exp()
            y = y.neg()  # beside the other, until that is released
            del y

    assert peak_bytes(work, torch.device("cpu")) == 2 * x.nbytes
