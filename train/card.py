"""What a trained model's card says of the run."""

from __future__ import annotations

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
            "held-out loss at the end": _last(history, "eval_loss"),
        }
        datasets = [str(source.path) for source in sources if source.format == "dataset" and _is_name(source.path)]
        languages = sorted({language_code(name) for name in _read(final / LANGUAGES)} - {"unknown"})
        found.append(StageFacts(name, [_line(source) for source in sources], languages, datasets, settings))
    return found


def _line(source: DataSource) -> str:
    """A source, without where it lies on someone's disk."""
    if source.path is None:
        return "records given by the program"
    path = source.path if _is_name(source.path) and source.format == "dataset" else Path(source.path).name
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
