"""The budget of a real run: what was asked for, and how many steps that is."""

import json
import statistics
import time

import torch

from layalign.train.stages import build

DEFAULT_MINUTES = 40
SHARES = {"translation": 0.2, "task": 0.8}
PLAN = "plan.json"
TIMED_PASSES = 5


def budget(minutes, steps):
    """{"minutes", "steps"}, one of them None; 40 minutes where neither is given. Raises ValueError."""
    if minutes is not None and steps is not None:
        raise ValueError("steps: give minutes or steps, not both")
    if steps is not None:
        check_count("steps", steps, 2)
        return {"minutes": None, "steps": steps}
    minutes = DEFAULT_MINUTES if minutes is None else minutes
    if not 0 < minutes < float("inf"):
        raise ValueError(f"minutes: got {minutes}, takes a number above 0")
    return {"minutes": minutes, "steps": None}


def check_count(name, value, least):
    """Raises ValueError unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value!r}, takes a whole number of at least {least}")


def read_plan(output, arguments):
    """The plan of an earlier call with the same arguments, or None. Raises ValueError for another run's folder."""
    file = output / PLAN
    if not file.exists():
        if output.exists() and any(output.iterdir()):
            raise ValueError(f"output: {output} is not empty and holds no {PLAN} of a real run; choose another folder")
        return None
    try:
        plan = json.loads(file.read_text(encoding="utf-8"))
        before = plan["arguments"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"output: {file} is unreadable ({error}); choose another folder") from error
    differing = [
        f"{key} {before.get(key)!r} there, {arguments[key]!r} here"
        for key in arguments
        if before.get(key) != arguments[key]
    ]
    if differing:
        raise ValueError(f"output: {output} holds a run with {'; '.join(differing)}; choose another folder")
    return plan


def plan_steps(arguments, recipe, records):
    """{stage: optimizer steps} of the budget; a budget in minutes is turned into steps by timing a few."""
    total = arguments["steps"]
    if total is None:
        total = 60 * arguments["minutes"] / seconds_per_step(recipe(), records)
    translation = max(1, round(total * SHARES["translation"]))
    return {"translation": translation, "task": max(1, round(total) - translation)}


def seconds_per_step(recipe, records):
    """Median seconds of a forward and backward pass of the task stage's model and batches, the first pass left out."""
    model, processor = build(recipe)
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    stage, seconds = recipe.stages["task"], []
    for place in range(TIMED_PASSES + 1):
        rows = records[place * stage.batch_size : (place + 1) * stage.batch_size]
        batch = processor([row["source"] for row in rows], prompt=None, target=[row["target"] for row in rows])
        started = time.monotonic()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=stage.precision == "bf16"):
            loss = model(**batch.to(model.device)).loss
        loss.backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds[1:])
