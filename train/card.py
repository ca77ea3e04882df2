"""What a trained model's card says of the run."""

from __future__ import annotations

from math import isfinite, nan
from pathlib import Path
from typing import Any

from layalign.kernels.files import read_json
from layalign.languages import language_code
from layalign.model_card import StageFacts
from layalign.train.data.data_source import DataSource
from layalign.train.processes import precision_of
from layalign.train.recipe import Recipe

# Beside the weights of a stage that has ended.
HISTORY, LANGUAGES = "history.json", "languages.json"


def stage_facts(recipe: Recipe) -> list[StageFacts]:
    """Of each stage of a recipe that has ended: its sources, their languages, what it was trained by and where its loss ended."""
    found = []
    for name, stage in recipe.stages.items():
        sources, held_out = stage.data, f"{stage.hold_out} of these" if stage.hold_out else None
        final = Path(recipe.output) / name / "final"
        history = _read(final / HISTORY)
        steps = max((entry.get("step", 0) for entry in history), default=None)
        kept = None
        if stage.keep == "best" and (best := [entry for entry in history if isfinite(entry.get("eval_loss", nan))]):
            lowest = min(best, key=lambda entry: entry["eval_loss"])
            kept = f"the best, of step {lowest.get('step')}: held-out loss {lowest['eval_loss']:.4f}"
        settings = {
            "steps": steps,
            "examples a step": stage.global_batch_size
            or f"{stage.batch_size} a process and call, {stage.gradient_accumulation or 1} calls",
            "learning rate": stage.learning_rate,
            "schedule": stage.schedule,
            "precision": precision_of(recipe, stage),
            "prompt": f"`{stage.prompt!r}`" if recipe.llm_input[name] and stage.prompt is not None else None,
            "seed": recipe.seed,
            "training loss at the end": _last(history, "loss"),
            "held out": held_out,
            "weights": kept,
            "held-out loss at the end": _last(history, "eval_loss"),
        }
        named = [_hub_names(source, recipe.data_root) for source in sources]
        lines = [_line(source, bool(there)) for source, there in zip(sources, named, strict=True)]
        datasets = [dataset for there in named for dataset in there]
        languages = {language_code(lang) for lang in _read(final / LANGUAGES)} - {"unknown"} - _left_out(stage.mixing)
        found.append(StageFacts(name, lines, sorted(languages), datasets, settings))
    return found


def _left_out(mixing: Any) -> set[str]:
    """Languages of the data that none is drawn of."""
    return (
        {language_code(lang) for lang, weight in mixing.items() if weight == 0} if isinstance(mixing, dict) else set()
    )


def _hub_names(source: DataSource, data_root: str | None) -> list[str]:
    """The names of a source's datasets; none of one that lies on a disk, whose folder is nobody's business."""
    parts = source.located(data_root) if source.format == "dataset" else []
    return [str(part.path) for part in parts] if all(_is_name(part.path) for part in parts) else []


def _line(source: DataSource, on_hub: bool) -> str:
    """A source, without where it lies on someone's disk."""
    if source.path is None:
        return "records given by the program"
    path = source.path if on_hub else Path(source.path).name
    parts = [source.subset, source.split if source.format == "dataset" else None]
    limits = [f"at most {source.limit}"] if source.limit else []
    limits += [f"at most {source.limit_per_language} a language"] if source.limit_per_language else []
    return ", ".join([f"`{path}` ({source.format})", *(part for part in parts if part), *limits])


def _is_name(path: Any) -> bool:
    return path is not None and not Path(path).exists() and path.count("/") <= 1 and not path.startswith((".", "/"))


def _read(path: Path) -> list[Any]:
    try:
        return read_json(path, list)
    except (OSError, ValueError):
        return []


def _last(history: list[dict[str, Any]], key: str) -> str | None:
    values = [entry[key] for entry in history if key in entry]
    return f"{values[-1]:.4f}" if values else None
