"""A training step, prefill and generation of LayAlign against the bare LLM and the published scheme.

    pytest bench/test_model.py

All systems run over the same weights, on the same positions and labels, and the encoder's forward is in each. Training
is forward, backward and an AdamW step of what a system trains; the bare LLM trains nothing.
"""

import dataclasses
import importlib.util
from functools import partial

import pytest
import torch
from measuring import CLOCK, Effort, Missing, measure
from model_case import CASES, twin
from model_systems import BareLLM, LayAlign, LigerLLM, System
from published_model import Published

SYSTEMS = ("bare", "bare + liger", "layalign", "published sdpa", "published eager")
STATIC = ("bare static", "layalign static")
CHECKED_TOKENS = 4
STEP_LIMIT, GENERATION_LIMIT, PEAK_LIMIT = 1.20, 1.10, 0.5  # on a CPU; of "layalign" over "bare", and the published way


def pytest_generate_tests(metafunc):
    """The cases of this machine, and with --full or --small those of --full."""
    option = metafunc.config.getoption
    device = "cuda" if torch.cuda.is_available() else "cpu"
    suite = metafunc.function.__name__.removeprefix("test_")
    every = option("full") or option("small")
    cases = {k: case for k, case in CASES[suite].items() if case.device == device and (every or not case.full)}
    names = SYSTEMS + STATIC if suite == "generation" else SYSTEMS
    sized = [case.small() if option("small") else case for case in cases.values()]
    metafunc.parametrize("case", sized, ids=list(cases))
    metafunc.parametrize("name", names)


def train(system):
    return system.train_step()


def prefill(system):
    return system.prefill()


class Compared:
    """The systems of one case by name, and the batch they share."""

    def __init__(self, case, training):
        self.encoder, self.llm = case.bases()
        self.batch = case.training() if training else case.prompt()
        shared = (self.encoder, twin(self.llm), self.batch)
        layalign = LayAlign(*shared, training)
        self.trained = layalign.trained
        self.systems = {
            "bare": self.system(BareLLM),
            "bare + liger": self._liger(train if training else prefill),
            "layalign": layalign,
            "published sdpa": self.system(Published, eager=False),
            "published eager": self.system(Published, eager=True),
        }

    def system(self, kind, dtype=None, **settings):
        """One over the same LLM, with a copy of the trained part. dtype: of both."""
        trained = self.trained.copied(dtype or torch.float32)
        return kind(self.encoder, twin(self.llm, dtype), self.batch, trained, **settings)

    def exact(self, work, kind=Published, **settings):
        """`work` of a system in fp64."""
        system = self.system(kind, torch.float64, **settings)
        system.llm.gradient_checkpointing_enable({"use_reentrant": False})
        # Checkpointing saves a GPU's memory: the graph of a 7B LLM in fp64 would not fit.
        system.llm.train(self.llm.device.type == "cuda")
        return work(system)

    def _liger(self, work):
        """Missing where it cannot run, or computes something else than the bare LLM."""
        if importlib.util.find_spec("liger_kernel") is None:
            return Missing("liger-kernel is not installed")
        if self.llm.device.type != "cuda":
            return Missing("liger-kernel needs a GPU")
        liger = self.system(LigerLLM)
        works = {"bare": partial(work, self.system(BareLLM)), "liger": partial(work, liger)}
        untimed = Effort(rounds=0, seconds=0.0, clock=None)
        found = measure(works, lambda: self.exact(work, BareLLM), "bare", self.llm.device, untimed, memory=False)
        return liger if found["liger"].error is None else Missing(found["liger"].error)


def measure_call(case, effort, call, training):
    """{name: Measurement} of `call(system)`."""
    compared = Compared(case, training)
    works = {name: _work(system, call) for name, system in compared.systems.items()}
    return _measure(case, works, partial(compared.exact, call, eager=False), effort, memory=True if training else None)


def measure_generation(case, effort):
    compared = Compared(case, training=False)
    given = torch.randint(3, case.vocabulary, (case.batch, CHECKED_TOKENS), generator=torch.Generator().manual_seed(3))
    given = given.to(case.device)
    works = {name: _work(system, _generation(case, given)) for name, system in compared.systems.items()}
    for name in STATIC:
        call = _generation(case, given, cache_implementation="static")
        on_gpu = case.device == "cuda"
        works[name] = _work(compared.systems[name.split()[0]], call) if on_gpu else Missing("pays with CUDA graphs")
    exact = partial(compared.exact, lambda system: system.forced(given, CHECKED_TOKENS), eager=False)
    return _measure(case, works, exact, effort, memory=False)


def _generation(case, given, **settings):
    """Call that generates, but first what is to be checked: the logits of given tokens (B, n), since the tokens that random
    weights choose may turn on a last bit."""
    checked = False

    def call(system):
        nonlocal checked
        if checked or not isinstance(system, System):
            system.generate(case.new_tokens, **settings)
            return None
        checked = True
        # On a GPU all tokens, so that no length is compiled for in a round.
        return system.forced(given, case.new_tokens if case.device == "cuda" else CHECKED_TOKENS, **settings)

    return call


def _work(system, call):
    """Missing, or a function without arguments; the bare LLM's results are not those to check."""
    if isinstance(system, Missing):
        return system

    def work():
        results = call(system)
        return results if isinstance(system, System) else None

    return work


def _measure(case, works, exact, effort, memory):
    if case.rounds is not None:
        effort = dataclasses.replace(effort, rounds=min(effort.rounds, case.rounds), seconds=0.0)
    return measure(works, exact, "published sdpa", torch.device(case.device), effort, memory=memory)


def enter(row, suite, case, name, measurements, **figures):
    """The row, with the ratio of peaks where both are known."""
    mine, published = measurements[name], measurements["published eager"]
    if mine.peak_bytes and published.peak_bytes:
        figures["peak_over_published"] = mine.peak_bytes / published.peak_bytes
    about = {"yardstick": "bare", "ours": name.startswith("layalign"), "dtype": case.dtype}
    row(suite, case, name, measurements, sizes=case.sizes(suite == "training step"), **about, **figures)
    return mine.ratio_to(measurements["bare"])


def promised(case, small):
    """Whether the limits are those of this case: the figures of a GPU are reported."""
    return case.device == "cpu" and not case.full and not small


@pytest.mark.benchmark(timer=CLOCK)
def test_training_step(row, measured_once, effort, small, case, name):
    measurements = measured_once(measure_call, case, effort, train, True)
    ratio = enter(row, "training step", case, name, measurements)
    if name == "layalign" and promised(case, small):
        if case.rounds is None:
            assert ratio <= STEP_LIMIT
        else:  # a case that is there for its memory
            assert measurements[name].peak_bytes <= PEAK_LIMIT * measurements["published eager"].peak_bytes


@pytest.mark.benchmark(timer=CLOCK)
def test_prefill(row, measured_once, effort, case, name):
    enter(row, "prefill", case, name, measured_once(measure_call, case, effort, prefill, False))


@pytest.mark.benchmark(timer=CLOCK)
def test_generation(row, measured_once, effort, small, case, name):
    measurements = measured_once(measure_generation, case, effort)
    seconds = measurements[name].seconds
    rate = {"tokens_per_second": case.batch * case.new_tokens / measurements[name].median()} if seconds else {}
    ratio = enter(row, "generation", case, name, measurements, **rate)
    if name == "layalign" and promised(case, small):
        assert ratio <= GENERATION_LIMIT
