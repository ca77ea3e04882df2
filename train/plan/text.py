"""A plan as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "gathered", "overhead")


def plan_text(plan: Mapping[str, Any]) -> str:
    """The lines of a plan.

    Args:
        plan: of `make_plan`.
    """
    return "\n".join(_lines(plan))


def duration(seconds: float) -> str:
    """A time, in the unit that suits it."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} seconds" if seconds < 10 else f"{seconds:.0f} seconds"


def _lines(plan: Mapping[str, Any]) -> Iterator[str]:
    trained, frozen = plan["parameters"]["trained"], plan["parameters"]["frozen"]
    share = trained["total"] / (trained["total"] + frozen["total"])
    yield f"Plan of {plan['output']}; no weights were loaded, nothing was written."
    yield ""
    yield "parameters"
    for role, base in plan["bases"].items():
        yield f"  {role:<12} {_millions(base['parameters']):>12}  {base['is']}, {base['dtype']}: {base['name']} ({base['class']})"
    parts = " + ".join(
        f"{part} {_millions(count) if part != 'gates' else f'{count:,}'}"
        for part, count in trained.items()
        if part != "total"
    )
    yield f"  {'trained':<12} {_millions(trained['total']):>12}  {parts}, fp32; {share:.2%} of all"
    yield ""
    engine = f" ({plan['parallel']})" if plan["parallel"] != "none" else ""
    yield f"machine: {plan['processes']}{engine} x {plan['machine']['name']}, {_gigabytes(plan['machine']['memory'])} each"
    for name, stage in plan["stages"].items():
        yield ""
        yield from _stage_lines(name, stage, plan)
    most = "at most " if any(stage["at_most"] and stage["epochs"] for stage in plan["stages"].values()) else ""
    if plan["seconds"] is not None and len(plan["stages"]) > 1:
        yield ""
        yield f"all stages: {most}about {duration(plan['seconds'])}, evaluations and checkpoints not counted"
    for note in plan["notes"]:
        yield ""
        yield f"note: {note}"


def _stage_lines(name, stage, plan):
    yield name
    held = f", {stage['held_out']:,} held out" if stage["held_out"] else ""
    most = "at most " if stage["at_most"] else ""
    examples = "not known" if stage["examples"] is None else f"{most}{stage['examples']:,}"
    yield f"  {'examples':<12} {examples}{held}"
    if tokens := stage["tokens_an_epoch"]:
        about = "about " if tokens["sampled"] else ""
        yield f"  {'tokens':<12} {about}{tokens['encoder']:,} of the encoder, {tokens['llm']:,} of the LLM in an epoch"
    fixed = not stage["epochs"]
    steps = "not known" if stage["steps"] is None else f"{'' if fixed else most}{stage['steps']:,}"
    epochs = f" ({stage['epochs']:g} epochs)" if stage["epochs"] else ""
    yield f"  {'steps':<12} {steps}{epochs}"
    size = f"at most {stage['batch_tokens']:,} tokens" if stage["batch_tokens"] else stage["batch_size"]
    yield (
        f"  {'batch':<12} {stage['global_batch']:,} examples = {plan['processes']} processes x {size} x "
        f"{stage['accumulation']} accumulated"
    )
    longest, memory = stage["longest_batch"], stage["memory"]
    parts = " + ".join(f"{part} {_gigabytes(memory[part])}" for part in PARTS if memory.get(part))
    room = "" if memory["total"] <= plan["machine"]["memory"] else "; MORE THAN THERE IS"
    yield f"  {'memory':<12} {_gigabytes(memory['total'])} a process{room}: {parts}"
    for key, what in (
        ("activations_without_checkpointing", "without gradient_checkpointing"),
        ("activations_if_checkpointing", "with gradient_checkpointing"),
    ):
        if key in stage:
            shape = f"{longest['rows']} x ({longest['encoder']} + {longest['llm']}) tokens"
            yield f"  {'':<12} activations {what}: {_gigabytes(stage[key])}; longest batch {shape}"
    time = "not known" if stage["seconds"] is None else f"{'' if fixed else most}about {duration(stage['seconds'])}"
    operations = stage["operations_a_step"] / 1e12
    yield f"  {'time':<12} {time}, an estimate from {operations:,.{0 if operations >= 100 else 3}f} TFLOP a step"


def _millions(count):
    return f"{count / 1e6:,.2f} M"


def _gigabytes(size):
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale / 10:
            return f"{size / scale:,.2f} {unit}"
    return f"{size / 1e3:,.2f} kB"
