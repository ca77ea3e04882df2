"""Recipes: everything a training run is made of, as validated dataclasses read from YAML."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml

from layalign.configuration import STAGES, LayAlignConfig
from layalign.languages import language_code, language_name
from layalign.train.prompts import check_template
from layalign.train.settings import build, check_key, check_range, convert_fields, override

SHIPPED = Path(__file__).parent / "recipes"
# Known from the recipe's other keys, or no setting of the trained part.
_NOT_MODEL_SETTINGS = {"encoder_config", "llm_config", "encoder_name_or_path", "llm_name_or_path", "llm_input"}


@dataclass(kw_only=True, slots=True)
class DataSource:
    """Where training records come from.

    Attributes:
        format: "pairs" (two line-aligned text files), "jsonl" (one JSON object a line), "json" (one list of objects),
            "tsv", "dataset" (a folder or hub name for the `datasets` library) or "records" (in memory).
        path: the file, folder or name; for pairs the source side. `{lang}` stands for each code of `languages`,
            `{language}` for its English name. Relative paths start at the recipe's `data_root`.
        target_path: the target side of pairs.
        records: the records themselves: dicts with "source", "target" and "lang".
        source, target: the field that holds the text, or a template over fields ("{question[stem]}"); the fields of
            pairs are called source and target.
        lang: language code of every record.
        lang_field: instead, the field that tells it (a code or an English name); by default "lang", where there is one.
        languages: only records of these languages (codes).
        columns: names of a TSV file's columns; None: its first line names them.
        subset, split: which part of a dataset.
        limit, limit_per_language: at most so many records, the first ones.
        on_bad_line: "error" stops at the first unusable line and names it; "skip" leaves it out, counts and reports it.
    """

    format: Literal["pairs", "jsonl", "json", "tsv", "dataset", "records"] = "records"
    path: str | None = None
    target_path: str | None = None
    records: Any = None
    source: str = "source"
    target: str = "target"
    lang: str | None = None
    lang_field: str | None = None
    languages: list[str] | None = None
    columns: list[str] | None = None
    subset: str | None = None
    split: str = "train"
    limit: int | None = None
    limit_per_language: int | None = None
    on_bad_line: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        convert_fields(self)
        check_range(self, limit=(1, None), limit_per_language=(1, None))
        if (self.format == "records") != (self.records is not None):
            given = "records are given" if self.records is not None else "none are given"
            raise ValueError(f"records: go with format 'records' and no other; format is {self.format!r} and {given}")
        if self.records is not None and not isinstance(self.records, (list, tuple)):
            raise ValueError(f"records: expected a list of dicts, got {type(self.records).__name__}")
        if self.format != "records" and self.path is None:
            raise ValueError(f"path: required for format {self.format!r}")
        if (self.format == "pairs") != (self.target_path is not None):
            raise ValueError(f"target_path: is the second file of format 'pairs', format is {self.format!r}")
        if self.lang is not None and self.lang_field is not None:
            raise ValueError("lang_field: give lang or lang_field, not both")
        if self.languages is not None:
            if not self.languages:
                raise ValueError("languages: empty list")
            self.languages = [language_code(language) for language in self.languages]
        for name in ("source", "target"):
            check_template(getattr(self, name), name)
        if self.path is not None:
            placeholders = {
                name for path in (self.path, self.target_path or "") for name in check_template(path, "path")
            }
            if placeholders - {"lang", "language"}:
                raise ValueError(f"path: takes {{lang}} and {{language}}, got {sorted(placeholders)}")
            if placeholders and self.languages is None:
                raise ValueError("languages: required, as path has a placeholder for them")

    def located(self, data_root: str | os.PathLike | None = None) -> "list[DataSource]":
        """This source with its paths below `data_root`, and one source for each language where the path has a placeholder."""
        if self.path is None:
            return [self]
        if not any(check_template(path, "path") for path in (self.path, self.target_path or "")):
            return [self._at(data_root, lambda path: path)]
        located = []
        for code in self.languages or ():
            names = {"lang": code, "language": language_name(code) if "{language}" in self.path else code}
            part = self._at(data_root, lambda path, names=names: path.format(**names))
            located.append(replace(part, lang=None if self.lang_field else code, languages=[code]))
        return located

    def files(self, data_root: str | os.PathLike | None = None) -> list[Path]:
        """The files this source reads (a dataset's hub name is none)."""
        if self.format in ("records", "dataset"):
            return []
        return [Path(path) for part in self.located(data_root) for path in (part.path, part.target_path) if path]

    def _at(self, data_root, fill):
        def place(path):
            path = Path(fill(path)).expanduser()
            below = Path(data_root or ".").expanduser() / path
            return str(path if self.format == "dataset" and not below.exists() else below)

        return replace(self, path=place(self.path), target_path=self.target_path and place(self.target_path))


@dataclass(kw_only=True, slots=True)
class StageRecipe:
    """One of the two training stages. The optimiser's defaults are the paper's.

    Attributes:
        data, eval_data: sources, read one after the other (one source need not be in a list).
        hold_out: so many records are taken out of `data` at random and evaluated on instead.
        steps: optimizer steps; or epochs (3 where neither is given).
        batch_size: examples in one forward call; times gradient_accumulation for one optimizer step.
        warmup_ratio: share of the steps in which the learning rate rises.
        precision: "bf16" is autocast over fp32 trained parameters.
        use_reentrant: only false is taken: reentrant gradient checkpointing cannot work here.
        prompt: what the LLM reads beside the soft prompts, with {source} and {language}, or "chat": the source by the LLM's chat
            template; where `llm_input` of the stage is true.
        source_max_length, target_max_length: tokens; the prompt is cut like the source.
        eval_steps, save_steps: every so many steps; None or 0: never (a finished stage is always saved).
        keep_checkpoints: so many stay, the newest ones.
        length_grouped: batches of similar length.
    """

    data: list[DataSource]
    eval_data: list[DataSource] | None = None
    hold_out: int = 0
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    eval_batch_size: int | None = None
    gradient_accumulation: int = 1
    learning_rate: float = 4e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.05
    weight_decay: float = 3e-7
    betas: list[float] = field(default_factory=lambda: [0.8, 0.999])
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    use_reentrant: bool = False
    prompt: str | None = None
    source_max_length: int = 200
    target_max_length: int = 200
    eval_steps: int | None = None
    save_steps: int | None = None
    log_steps: int = 10
    keep_checkpoints: int = 2
    length_grouped: bool = False

    def __post_init__(self) -> None:
        for name in ("data", "eval_data"):
            if isinstance(getattr(self, name), (dict, DataSource)):
                setattr(self, name, [getattr(self, name)])
        convert_fields(self)
        check_range(
            self,
            hold_out=(0, None),
            steps=(1, None),
            batch_size=(1, None),
            eval_batch_size=(1, None),
            gradient_accumulation=(1, None),
            learning_rate=(0, 1),
            warmup_ratio=(0, 0.999),
            weight_decay=(0, 1),
            eps=(0, 1),
            max_grad_norm=(0, 1e9),
            source_max_length=(1, None),
            target_max_length=(2, None),
            eval_steps=(0, None),
            save_steps=(0, None),
            log_steps=(1, None),
            keep_checkpoints=(1, None),
        )
        if not self.data:
            raise ValueError("data: at least one source is needed")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: two numbers from 0 to below 1, got {self.betas}")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("epochs: give steps or epochs, not both")
        if self.steps is None:
            self.epochs = 3.0 if self.epochs is None else self.epochs
            if not 0 < self.epochs <= 1e6:
                raise ValueError(f"epochs: must be above 0 and at most 1000000, got {self.epochs}")
        if self.use_reentrant:
            raise ValueError(
                "use_reentrant: reentrant gradient checkpointing cannot work: all LLM layers share the aligner's output"
            )
        if self.hold_out and self.eval_data:
            raise ValueError("hold_out: give hold_out or eval_data, not both")
        if self.eval_steps and not (self.hold_out or self.eval_data):
            raise ValueError("eval_steps: needs eval_data or hold_out to evaluate on")
        if self.prompt is not None and (wrong := set(check_template(self.prompt, "prompt")) - {"source", "language"}):
            raise ValueError(f"prompt: takes {{source}} and {{language}}, got {sorted(wrong)}")


@dataclass(kw_only=True, slots=True)
class Recipe:
    """A training run.

    Attributes:
        encoder, llm: name, folder or `layalign:NAME` of the two frozen bases.
        output: folder of the run: its state while it runs, and the trained model in `output/model`.
        stages: "translation" and "task", or one of them; always run in that order.
        model: further arguments of `LayAlignForConditionalGeneration.from_bases` (aligner, adapter, gate, dtype, ...).
        llm_input: per stage, whether the LLM reads the prompt text as well.
        seed: of the trained part's first values and of the order of the data.
        data_root: folder that relative data paths start at; default: the current folder.
        device: "auto" takes an accelerator where there is one.
        report_to: "none", "tensorboard" or another reporter known to transformers.
        progress: show progress bars.
    """

    encoder: str
    llm: str
    output: str
    stages: dict[str, StageRecipe]
    model: dict[str, Any] = field(default_factory=dict)
    llm_input: dict[str, bool] = field(default_factory=dict)
    seed: int = 0
    data_root: str | None = None
    device: Literal["auto", "cpu"] = "auto"
    report_to: str = "none"
    progress: bool = True

    def __post_init__(self) -> None:
        convert_fields(self)
        check_range(self, seed=(0, 2**31 - 1))
        for name in ("encoder", "llm", "output"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}: empty")
        if not self.stages:
            raise ValueError(f"stages: at least one of {', '.join(STAGES)} is needed")
        known = [setting.name for setting in fields(LayAlignConfig) if setting.init]
        own = [name for name in LayAlignConfig.__annotations__ if name in known and name not in _NOT_MODEL_SETTINGS]
        _check_keys(self.stages, STAGES, "stages")
        _check_keys(self.llm_input, STAGES, "llm_input")
        _check_keys(self.model, [*own, "dtype"], "model")
        self.llm_input = {"translation": False, "task": True} | self.llm_input
        try:
            LayAlignConfig(**{key: value for key, value in self.model.items() if key != "dtype"})
        except (ValueError, TypeError) as error:
            raise ValueError(f"model: {error}") from None
        for name, stage in self.stages.items():
            if self.llm_input[name] and stage.prompt is None:
                raise ValueError(
                    f"stages.{name}.prompt: required, as the LLM reads text in this stage (llm_input.{name} is true); "
                    'the question alone is "{source}"'
                )
        if self.report_to == "tensorboard" and find_spec("tensorboard") is None:
            raise ValueError("report_to: tensorboard is not installed; pip install tensorboard")

    def check_files(self) -> None:
        """Look for the data files.

        Raises:
            ValueError: with the names of those that do not exist.
        """
        missing = []
        for name, stage in self.stages.items():
            for source in (*stage.data, *(stage.eval_data or ())):
                missing += [f"stages.{name}: {path}" for path in source.files(self.data_root) if not path.is_file()]
        if missing:
            shown = missing[:10] + ([f"and {len(missing) - 10} more"] if len(missing) > 10 else [])
            raise ValueError("data files not found (data_root is where relative paths start):\n  " + "\n  ".join(shown))


def load_recipe(path: str | os.PathLike, overrides: Iterable[str] = (), check_files: bool = True) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file, or the name of a shipped recipe ("math", "xcsqa", "xnli").
        overrides: "key=value" with dots between nested keys ("stages.task.data.0.limit=10"); values are read as YAML.
        check_files: also check that the data files exist.

    Raises:
        ValueError: no such file, broken YAML, an unknown key, a wrong value, or missing data files.
    """
    file = _find(path)
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: a recipe is a mapping of settings, got {type(values).__name__}")
    for assignment in overrides:
        override(values, assignment)
    try:
        recipe = build(Recipe, values)
        if check_files:
            recipe.check_files()
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return recipe


def _find(path: str | os.PathLike) -> Path:
    shipped = SHIPPED / f"{Path(path).name.removesuffix('.yaml')}.yaml"
    if Path(path).is_file():
        return Path(path)
    if Path(path).parent == Path(".") and shipped.is_file():
        return shipped
    names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
    raise ValueError(f"{path}: no such recipe file; shipped recipes: {names}")


def _check_keys(values: Iterable[str], known: Sequence[str], name: str) -> None:
    for key in values:
        try:
            check_key(key, list(known))
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
