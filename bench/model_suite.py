"""The systems of the model suites on one case: the bare LLM, LayAlign and all peers over the same weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cases.model import ModelCase, in_fp64, packed_rows, twin
from bench.machine import machine
from bench.measuring import LEFT_OUT, Effort, Measurement, Missing, Results, measure
from bench.model_systems import BareLLM, LayAlign, PackedBareLLM, System
from bench.peers import peers_of
from bench.peers.model.published import Published

PEERS = peers_of("model", "model")
SYSTEMS = ("bare", "layalign", *PEERS)
STATIC = ("bare static", "layalign static")  # generation alone
PACKED = ("bare packed", "layalign packed")  # training on skewed rows alone
CHECKED_TOKENS = 4
Call = Callable[[Any], "Results | None"]


def train(system: System | BareLLM) -> Results:
    """One step."""
    return system.train_step()


def prefill(system: System | BareLLM) -> Results:
    """Logits of the first new token."""
    return system.prefill()


class Compared:
    """The systems of one case by name, and the batch they share."""

    def __init__(self, case: ModelCase, training: bool):
        self.call = train if training else prefill
        self.encoder, self.llm = case.bases()
        self.batch = case.training() if training else case.prompt()
        layalign = LayAlign(self.encoder, twin(self.llm), self.batch, training)
        self.trained = layalign.trained
        self.systems = {"bare": self.system(BareLLM), "layalign": layalign}
        self.systems |= {name: make(self) for name, make in PEERS.items()}
        if training:
            self.systems |= (
                self._packed() if case.skewed else dict.fromkeys(PACKED, Missing("all rows are of one length"))
            )

    def _packed(self) -> dict[str, Any]:
        """Those of PACKED."""
        layalign = LayAlign(self.encoder, twin(self.llm), packed_rows(self.batch), training=True)
        return {"bare packed": self.system(PackedBareLLM), "layalign packed": layalign.take(self.trained)}

    def system(self, kind: Callable, exact: bool = False, **settings: Any) -> Any:
        """One over the same LLM, with a copy of the trained part. exact: both in fp64."""
        llm, dtype = (in_fp64(self.llm), torch.float64) if exact else (twin(self.llm), torch.float32)
        return kind(self.encoder, llm, self.batch, self.trained.copied(dtype), **settings)

    def exact(self, call: Call, kind: Callable = Published, **settings: Any) -> Results:
        """`call` of a system in fp64, by one path on every device."""
        return call(self.system(kind, exact=True, **settings))

    def as_bare(self, kind: Callable) -> Any:
        """A system of that kind, Missing where it computes something else than the bare LLM."""
        system = self.system(kind)
        works = {"bare": partial(self.call, self.system(BareLLM)), "other": partial(self.call, system)}
        untimed = Effort(rounds=0, seconds=0.0, clock=lambda: 0.0)
        exact = partial(self.exact, self.call, BareLLM)
        found = measure(works, exact, "bare", self.llm.device, untimed, memory=False)
        return system if found["other"].error is None else Missing(found["other"].error)


def measure_call(case: ModelCase, effort: Effort, call: Call, training: bool) -> dict[str, Measurement]:
    """Of `call(system)`, for each system."""
    compared = Compared(case, training)
    works = {name: _work(system, call) for name, system in compared.systems.items()}
    return _measure(case, works, partial(compared.exact, call, eager=False), effort, memory=True if training else None)


def measure_generation(case: ModelCase, effort: Effort) -> dict[str, Measurement]:
    """Of the case's new tokens; on a GPU with a static cache too, of those in STATIC."""
    compared = Compared(case, training=False)
    given = torch.randint(3, case.vocabulary, (case.batch, CHECKED_TOKENS), generator=torch.Generator().manual_seed(3))
    given = given.to(case.device)
    works = {name: _work(system, _generation(case, given)) for name, system in compared.systems.items()}
    for name in STATIC:
        call = _generation(case, given, cache_implementation="static")
        if case.device != "cuda":
            works[name] = Missing("pays with CUDA graphs")
        elif name in machine().left_out:
            works[name] = Missing(f"{name} {LEFT_OUT}")
        else:
            works[name] = _work(compared.systems[name.split()[0]], call)
    exact = partial(compared.exact, lambda system: system.forced(given, CHECKED_TOKENS), eager=False)
    return _measure(case, works, exact, effort, memory=False)


def _generation(case: ModelCase, given: Tensor, **settings: Any) -> Call:
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
