"""The report of a run as one HTML page that needs nothing else: no script, no font, no address."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

import yaml

from layalign.pages import definitions, table, whole_page
from layalign.train.plan.text import duration
from layalign.train.report.charts import Series, heat_map, line_chart
from layalign.train.report.data import RunReport, StageReport
from layalign.train.report.style import style

_STATES = {"ended": "good", "under way": "soft", "interrupted": "bad"}
_MOST_LANGUAGES = 16


def page(run: RunReport) -> str:
    """The whole page.

    Args:
        run: of `read_run`.
    """
    title = f"Training run: {run.folder.resolve().name}"
    return whole_page(title, (*_head(run, title), *_stages(run), *_samples(run), *_settings(run)), style())


def _head(run: RunReport, title: str) -> Iterator[str]:
    bases = [str(run.recipe[role]) for role in ("encoder", "llm") if role in run.recipe]
    yield f"<h1>{escape(title)}</h1>"
    joined = f"LayAlign: {escape(' and '.join(bases))}" if bases else "LayAlign"
    yield f'<p><span class="badge {_STATES[run.state]}">{run.state}</span><span class="soft">{joined}</span></p>'
    for problem in run.problems:
        yield f'<div class="note"><b>Damaged:</b> {escape(problem)}</div>'
    for stage in run.stages:
        for step, text in stage.warnings:
            yield f'<div class="note"><b>Step {step:,}:</b> {escape(text)}</div>'
    header = ("stage", "", "steps", "examples", "loss", "held-out loss", "lowest", "tokens/s", "time")
    yield "<h2>Stages</h2>"
    yield from table(header, [_row(stage, run.state) for stage in run.stages], first_number=2)


def _row(stage: StageReport, state: str) -> list[str]:
    losses, held_out = stage.points("loss"), _finite(stage.points("eval_loss"))
    speed = [value for _, value in _finite(stage.points("tokens_per_second"))]
    begun = bool(stage.logs or stage.starts)
    word = (
        "ended" if stage.ended else (state if state != "ended" and begun else "interrupted" if begun else "not begun")
    )
    best = min(held_out, key=lambda point: point[1]) if held_out else None
    return [
        stage.name,
        word,
        f"{stage.step:,} of {stage.steps:,}" if stage.steps else f"{stage.step:,}",
        f"{stage.data['records']:,}" if isinstance(stage.data.get("records"), int) else "",
        f"{losses[-1][1]:.4g}" if losses else "",
        f"{held_out[-1][1]:.4g}" if held_out else "",
        f"{best[1]:.4g} at {best[0]:,}" if best else "",
        f"{median(speed):,.0f}" if speed else "",
        duration(stage.seconds) if stage.seconds else "",
    ]


def _stages(run: RunReport) -> Iterator[str]:
    for stage in run.stages:
        charts = [chart for chart in _charts(stage) if chart]
        if not charts:
            continue
        yield f"<h2>{escape(stage.name.capitalize())}</h2>"
        yield f'<div class="charts">{"".join(charts)}</div>'
        yield from _figures(stage)


def _charts(stage: StageReport) -> Iterator[str]:
    held_out = Series("held out", stage.points("eval_loss"), 2, dots=len(stage.points("eval_loss")) < 40)
    yield line_chart(
        "Loss", "nats a token", [Series("training", stage.points("loss"), smooth=True), held_out], log_scale=True
    )
    keys = stage.keys("eval_loss_")
    last = {key: stage.points(key)[-1][1] for key in keys if stage.points(key)}
    shown = sorted(last, key=lambda key: -last[key])[:_MOST_LANGUAGES]
    more = f"; the {_MOST_LANGUAGES} highest of {len(last)}" if len(last) > len(shown) else ""
    languages = [
        Series(
            key.removeprefix("eval_loss_"),
            stage.points(key),
            sorted(last).index(key) + 1,
            dots=len(stage.points(key)) < 12,
        )
        for key in shown
    ]
    yield line_chart("Held-out loss by language", f"nats a token{more}", languages)
    yield line_chart("Gates, mean of all layers", "absolute value", [Series("gates", stage.points("gate_mean"))])
    layers = stage.keys("gate_layer_")
    logs = [log for log in stage.logs if all(isinstance(log.get(key), (int, float)) for key in layers)]
    rows = [[float(log[key]) for log in logs] for key in layers]
    names = [key.removeprefix("gate_layer_") for key in layers]
    if layers and logs:
        yield heat_map("Gates by layer of the LLM", "absolute value", names, [log["step"] for log in logs], rows)
    yield line_chart("Learning rate", "a step", [Series("learning rate", stage.points("learning_rate"))])
    yield line_chart(
        "Gradient norm", "before clipping", [Series("norm", stage.points("grad_norm"), smooth=True)], log_scale=True
    )
    speed = [Series("tokens/s", stage.points("tokens_per_second"), smooth=True)]
    yield line_chart("Speed", "real tokens of encoder and LLM a second", speed)


def _figures(stage: StageReport) -> Iterator[str]:
    """The charts' figures as a table, for who cannot see them or wants the numbers."""
    keys = [key for key in stage.keys("") if key not in ("step", "time", "epoch") and not key.startswith("gate_layer_")]
    keys = [
        key
        for key in keys
        if not key.endswith(("runtime", "samples_per_second", "steps_per_second", "remaining_seconds"))
    ]
    every = max(1, math.ceil(len(stage.logs) / 60))
    logs = [
        log
        for index, log in enumerate(stage.logs)
        if index % every == 0 or index == len(stage.logs) - 1 or "eval_loss" in log
    ]
    rows = [[f"{log['step']:,}", *(_cell(log.get(key)) for key in keys)] for log in logs]
    yield f"<details><summary>{len(rows)} of {len(stage.logs)} logs as a table</summary>"
    yield from table(("step", *keys), rows, first_number=0)
    yield "</details>"


def _samples(run: RunReport) -> Iterator[str]:
    if not run.samples:
        return
    yield "<h2>Samples</h2>"
    yield '<p class="soft">Of the last stage; the answers are the trained model\'s, greedily, if they were asked for (--samples).</p>'
    rows = []
    answered = [sample for sample in run.samples if "answer" in sample]
    for sample in answered or run.samples[:8]:
        texts = [str(sample.get(key) or "") for key in ("lang", "source", "target", "answer")]
        rows.append([*texts, "held out" if sample.get("held_out") else "trained on"])
    yield from table(("language", "source", "target", "answer", "seen"), rows)


def _settings(run: RunReport) -> Iterator[str]:
    for stage in run.stages:
        if stage.data:
            yield f"<h2>Data of the {escape(stage.name)} stage</h2>"
            yield from _list(stage.data)
    starts = [(stage.name, start) for stage in run.stages for start in stage.starts]
    if starts:
        _, last = starts[-1]
        yield "<h2>Machine and versions</h2>"
        device, processes = last["start"].get("device"), last["start"].get("processes")
        versions = last["start"].get("versions")
        shown = {"device": device, "processes": processes, "started": f"{len(starts)} times, counting each stage"}
        yield from _list(shown | (versions if isinstance(versions, dict) else {}))
    if run.recipe:
        text = yaml.safe_dump(_without_defaults(run.recipe), sort_keys=False, allow_unicode=True, width=100)
        yield f"<h2>Settings</h2><details open><summary>The recipe, without what is not set</summary><pre>{escape(text)}</pre></details>"


def _without_defaults(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {str(key): _without_defaults(item) for key, item in value.items() if item is not None}
        return {key: item for key, item in kept.items() if item not in ({}, [])}
    return [_without_defaults(item) for item in value] if isinstance(value, list) else value


def _list(values: Mapping[str, Any]) -> Iterator[str]:
    return definitions(
        {
            str(key): yaml.safe_dump(value, allow_unicode=True) if isinstance(value, (dict, list)) else str(value)
            for key, value in values.items()
        }
    )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(step, value) for step, value in points if math.isfinite(value)]
