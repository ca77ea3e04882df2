"""The model card (README.md) of a saved model, written from what is known: bases, settings, training run, evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from layalign.base_models import BESIDE
from layalign.configuration import SETTINGS, encoder_depth
from layalign.figures import markdown_table
from layalign.kernels.files import read_json, write_text
from layalign.parts import part_of, parts_of, trained_parameters
from layalign.quantization import BASES
from layalign.shards import counts

if TYPE_CHECKING:
    from layalign import LayAlignConfig, LayAlignForConditionalGeneration

NAME = "README.md"
PAPER = "2502.11405"
# How a card of ours is told from one that someone has written.
MARK = "<!-- written by layalign; a card without this line is left as it is -->"


@dataclass(frozen=True)
class StageFacts:
    """What a card says of one training stage.

    Attributes:
        name: "translation" or "task".
        data: a line for each source.
        languages: codes of what was trained on.
        datasets: names on the hub, of those sources that have one.
        settings: what else is worth telling, by name.
    """

    name: str
    data: Sequence[str]
    languages: Sequence[str]
    datasets: Sequence[str]
    settings: dict[str, Any]


def model_card(
    model: LayAlignForConditionalGeneration,
    name: str,
    stages: Sequence[StageFacts] = (),
    evaluations: Sequence[str | PathLike] = (),
) -> ModelCard:
    """The card of a model.

    Args:
        model: the model.
        name: its name on the hub, or its folder's.
        stages: what it was trained in; none: the card says nothing of training.
        evaluations: folders that `layalign evaluate` wrote.

    Raises:
        ValueError: a folder without a finished evaluation.
    """
    config, results = model.config, [_results(folder) for folder in evaluations]
    hub = [base for base in (config.encoder_name_or_path, config.llm_name_or_path) if base and _on_hub(base)]
    languages = sorted({code for stage in stages for code in stage.languages})
    data = ModelCardData(
        library_name="layalign",
        pipeline_tag="text-generation",
        tags=["layalign", f"arxiv:{PAPER}"],
        base_model=hub or None,
        language=languages or None,
        datasets=sorted({name for stage in stages for name in stage.datasets}) or None,
        model_name=name if results else None,
        eval_results=[one for found in results for one in _eval_results(found)] or None,
    )
    lines = [
        f"# {name}",
        "",
        MARK,
        "",
        f"A [LayAlign](https://arxiv.org/abs/{PAPER}) model: a multilingual encoder joined to an LLM. The files hold what was trained "
        "and say where the two bases are.",
        "",
        "```python",
        "import layalign, transformers",
        "",
        f'pipe = transformers.pipeline("layalign-generation", model="{name}")',
        "```",
        "",
        "## Bases",
        "",
        *markdown_table(["", "model", "revision", "sizes"], _bases(config), "l"),
        "",
        "## Trained",
        "",
        *markdown_table(["part", "parameters"], _parts(model)),
        "",
        *markdown_table(["setting", "value"], _settings(config), "l"),
    ]
    for stage in stages:
        lines += ["", f"## Training: {stage.name} stage", "", *[f"- {line}" for line in stage.data], ""]
        rows = [["languages", ", ".join(stage.languages)]] if stage.languages else []
        rows += [[key, str(value)] for key, value in stage.settings.items() if value is not None]
        lines += markdown_table(["", "value"], rows, "l")
    if results:
        lines += ["", "## Evaluation", ""]
        lines += [line for folder in evaluations for line in _table(folder)]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines).rstrip() + "\n")


def write_card(folder: str | PathLike, card: ModelCard) -> None:
    """Write a card into a model's folder, unless someone else's is there."""
    path = Path(folder) / NAME
    if not path.exists() or MARK in path.read_text(encoding="utf-8"):
        write_text(path, str(card))


def _on_hub(base: str) -> bool:
    return base.count("/") == 1 and not Path(base).is_absolute() and not Path(base).is_dir()


def _bases(config: LayAlignConfig) -> list[list[str]]:
    rows = []
    for role in BASES:
        own = getattr(config, f"{role}_config")
        if own is None:
            continue
        place = {key: value for key, value in (config.base_sources or {}).get(role, {}).items() if key != BESIDE}
        text = own.get_text_config()
        layers = encoder_depth(own) if role == "encoder" else text.num_hidden_layers
        # Of a folder its last name alone: where it lies on someone's disk says nothing to others.
        name = getattr(config, f"{role}_name_or_path") or own.model_type
        name = name if _on_hub(name) or name.startswith("layalign:") else Path(name).name
        if "subfolder" in place:
            name = f"{name}/{place['subfolder']}"
        sizes = f"{own.model_type}, {layers} layers of width {text.hidden_size}"
        rows.append([role, name, place.get("revision", ""), sizes])
    return rows


def _parts(model: LayAlignForConditionalGeneration) -> list[list[str]]:
    found = dict.fromkeys(parts_of(model.config), 0)
    for name, parameter in trained_parameters(model):
        part = part_of(name)
        if part in found:
            found[part] += counts(parameter)[0]
    return [[part, f"{count:,}"] for part, count in found.items()]


def _settings(config: LayAlignConfig) -> list[list[str]]:
    return [[name, f"`{getattr(config, name)!r}`"] for name in SETTINGS]


def _results(folder: str | PathLike) -> dict[str, Any]:
    path = Path(folder) / "results.json"
    try:
        found = read_json(path)
        _ = {task: own["summary"] for task, own in found["tasks"].items()}
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no finished evaluation: no results.json") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the results of an evaluation: {error!r}") from None
    return found


def _eval_results(found: dict[str, Any]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=Path(task).stem,
            dataset_name=Path(task).stem,
            metric_type=scorer,
            metric_name=f"{group}, {scorer} scorer",
            metric_value=round(value, 2),
        )
        for task, own in found["tasks"].items()
        for scorer, groups in own["summary"].items()
        for group, value in groups.items()
        if value is not None
    ]


def _table(folder: str | PathLike) -> list[str]:
    path = Path(folder) / "table.md"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [*(f"#{line}" if line.startswith("## ") else line for line in lines), ""]
