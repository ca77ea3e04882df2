"""The systems that are compared, each a setting of the one model, and the runs made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class System:
    """A setting of the one model.

    Attributes:
        name, title: in files and in tables.
        settings: of LayAlignConfig.
        stages: what is trained, always the same number of steps altogether.
        seeds: whether it is repeated with every seed asked for, or trained with the first alone.
        llm_input: whether the LLM reads the question too, in the task stage of a pair whose LLM does.
    """

    name: str
    title: str
    settings: dict = field(default_factory=dict)
    stages: tuple[str, ...] = ("translation", "task")
    seeds: bool = False
    llm_input: bool = True


SYSTEMS = {
    system.name: system
    for system in (
        System("layalign", "LayAlign", seeds=True),
        System("mindmerger", "MindMerger", {"aligner": None}, seeds=True),
        System("langbridge", "LangBridge", {"adapter": "linear", "aligner": None}, llm_input=False),
        System("layalign_task_only", "LayAlign, no translation stage", stages=("task",)),
        System("layalign_translation", "LayAlign, translation stage alone", stages=("translation",)),
        System(
            "mindmerger_translation", "MindMerger, translation stage alone", {"aligner": None}, stages=("translation",)
        ),
        System("layalign_last_state", "LayAlign, last encoder state only", {"encoder_states": "last"}),
        System("layalign_no_adapter", "LayAlign without adapter", {"adapter": None}),
    )
}
LLM_ALONE = "llm"
TITLES = {LLM_ALONE: "LLM alone"} | {name: system.title for name, system in SYSTEMS.items()}


def runs_of(systems: Sequence[str], seeds: Sequence[int]) -> list[tuple[System, int]]:
    """(system, seed) in the order they are trained: all systems with the first seed, then those that are repeated.

    Raises:
        ValueError: an unknown or repeated name, or no or a repeated seed.
    """
    if unknown := [name for name in systems if name not in TITLES]:
        raise ValueError(f"systems: no {', '.join(unknown)}; there are {', '.join(TITLES)}")
    if not systems or len(set(systems)) != len(systems):
        raise ValueError(f"systems: got {list(systems)}, takes at least one, none twice")
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds: got {list(seeds)}, takes at least one from 0 up, none twice")
    return [
        (SYSTEMS[name], seed)
        for place, seed in enumerate(seeds)
        for name in systems
        if name != LLM_ALONE and (place == 0 or SYSTEMS[name].seeds)
    ]
