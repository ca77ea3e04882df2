"""Recipes: everything a training run is made of, as validated dataclasses read from YAML."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from layalign.configuration import STAGES, LayAlignConfig
from layalign.train.data_source import DataSource
from layalign.train.initial import initial_file
from layalign.train.prompts import check_template
from layalign.train.settings import build, check_key, check_range, convert, convert_fields, override

DEFAULT_SAVE_MINUTES = 5.0
SHIPPED = Path(__file__).parent / "recipes"
# Known from the recipe's other keys, or no setting of the trained part.
_NOT_MODEL_SETTINGS = {"encoder_config", "llm_config", "encoder_name_or_path", "llm_name_or_path", "llm_input"}
# Where a reporter is not called like its package.
_PACKAGES = {"azure_ml": "azureml-core", "flyte": "flytekit"}


@dataclass(kw_only=True, slots=True)
class StageRecipe:
    """One of the two training stages. The optimiser's defaults are the paper's.

    Attributes:
        data, eval_data: sources, read one after the other (one source need not be in a list).
        hold_out: so many records are taken out of `data` at random and evaluated on instead.
        steps: optimizer steps; or epochs (3 where neither is given).
        batch_size: examples in one forward call of one process.
        global_batch_size: examples in one optimizer step, over all processes; divided by these and by batch_size, it gives
            the forward calls of a step. Or give these: gradient_accumulation (1 where neither is given).
        warmup_ratio: share of the steps in which the learning rate rises.
        precision: "bf16" is autocast over fp32 trained parameters.
        use_reentrant: only false is taken: reentrant gradient checkpointing cannot work here.
        prompt: what the LLM reads beside the soft prompts, with {source} and {language}, or "chat": the source by the LLM's chat
            template; where `llm_input` of the stage is true.
        source_max_length, target_max_length: tokens; the prompt is cut like the source.
        eval_steps: every so many steps, and after the last one; None or 0: never.
        keep: which weights the stage ends with: "last", or the "best" by the held-out loss.
        early_stopping: the stage ends when so many evaluations in a row have brought no better one; None: never.
        save_steps, save_minutes: a checkpoint every so many steps, every so many minutes; 0: never. Where neither is
            given, at most 5 minutes of work are ever lost. A finished stage is always saved.
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
    global_batch_size: int | None = None
    gradient_accumulation: int | None = None
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
    keep: Literal["best", "last"] = "last"
    early_stopping: int | None = None
    save_steps: int | None = None
    save_minutes: float | None = None
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
            global_batch_size=(1, None),
            gradient_accumulation=(1, None),
            learning_rate=(0, 1),
            warmup_ratio=(0, 0.999),
            weight_decay=(0, 1),
            eps=(0, 1),
            max_grad_norm=(0, 1e9),
            source_max_length=(1, None),
            target_max_length=(2, None),
            eval_steps=(0, None),
            early_stopping=(1, None),
            save_steps=(0, None),
            save_minutes=(0, 1e6),
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
        if self.keep == "best" and not self.eval_steps:
            raise ValueError("keep: best is found by evaluations, but eval_steps is not set")
        if self.early_stopping is not None and not self.eval_steps:
            raise ValueError("early_stopping: counts evaluations, but eval_steps is not set")
        if self.global_batch_size is not None and self.gradient_accumulation is not None:
            raise ValueError(
                f"gradient_accumulation: follows from global_batch_size; got {self.gradient_accumulation} and "
                f"{self.global_batch_size}, give one of them"
            )
        self.accumulation(1)
        if self.prompt is not None and (wrong := set(check_template(self.prompt, "prompt")) - {"source", "language"}):
            raise ValueError(f"prompt: takes {{source}} and {{language}}, got {sorted(wrong)}")

    def accumulation(self, processes: int) -> int:
        """Forward calls of one process in one optimizer step.

        Args:
            processes: that train together.

        Raises:
            ValueError: a global_batch_size that cannot be divided so.
        """
        if self.global_batch_size is None:
            return self.gradient_accumulation or 1
        at_once = processes * self.batch_size
        if self.global_batch_size % at_once:
            nearest = max(round(self.global_batch_size / at_once), 1) * at_once
            raise ValueError(
                f"global_batch_size: {self.global_batch_size} examples do not divide into forward calls of {at_once} "
                f"({processes} {'process' if processes == 1 else 'processes'} x batch_size {self.batch_size}); "
                f"{nearest} would, or another batch_size"
            )
        return self.global_batch_size // at_once

    @property
    def minutes_between_saves(self) -> float | None:
        """How long may pass before a checkpoint is made; None: any time."""
        default = DEFAULT_SAVE_MINUTES if self.save_steps is None else None
        return default if self.save_minutes is None else self.save_minutes or None


@dataclass(kw_only=True, slots=True)
class InitFrom:
    """What the trained part starts from instead of random values.

    Attributes:
        path: the folder of a saved model, of a run, of a stage or of a checkpoint, or the published pytorch_model.bin.
        only: which of its parts are taken: "adapter", "aligner", "gates"; None: all.
    """

    path: str
    only: list[Literal["adapter", "aligner", "gates"]] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.only, str):
            self.only = [self.only]
        convert_fields(self)
        if not self.path.strip():
            raise ValueError("path: empty")
        if self.only is not None and not self.only:
            raise ValueError("only: empty list; adapter, aligner and gates are taken where it is left out")
        if self.only is not None and len(set(self.only)) < len(self.only):
            raise ValueError(f"only: {self.only} names a part twice")


@dataclass(kw_only=True, slots=True)
class Recipe:
    """A training run.

    Attributes:
        encoder, llm: name, folder or `layalign:NAME` of the two frozen bases.
        output: folder of the run: its state while it runs, and the trained model in `output/model`.
        stages: "translation" and "task", or one of them; always run in that order.
        model: further arguments of `LayAlignForConditionalGeneration.from_bases` (aligner, adapter, gate, dtype, ...).
        llm_input: per stage, whether the LLM reads the prompt text as well.
        init_from: what the trained part starts from: a path, or a path and which of its parts (`InitFrom`); None: random
            values.
        seed: of the trained part's first values and of the order of the data.
        data_root: folder that relative data paths start at; default: the current folder.
        device: "auto" takes an accelerator where there is one.
        report_to: "none", "tensorboard", "wandb", "trackio" or another reporter known to transformers, or a list of them.
        progress: show a progress bar; false: print a line for each log instead.
    """

    encoder: str
    llm: str
    output: str
    stages: dict[str, StageRecipe]
    model: dict[str, Any] = field(default_factory=dict)
    llm_input: dict[str, bool] = field(default_factory=dict)
    init_from: InitFrom | None = None
    seed: int = 0
    data_root: str | None = None
    device: Literal["auto", "cpu"] = "auto"
    report_to: list[str] = field(default_factory=lambda: ["none"])
    progress: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.init_from, str):
            self.init_from = convert({"path": self.init_from}, InitFrom, "init_from")
        if isinstance(self.report_to, str):
            self.report_to = [self.report_to]
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
        _check_reporters(self.report_to)

    def check_files(self) -> None:
        """Look for the data files.

        Raises:
            ValueError: with the names of those that do not exist.
        """
        missing = []
        for name, stage in self.stages.items():
            for source in (*stage.data, *(stage.eval_data or ())):
                missing += [f"stages.{name}: {path}" for path in source.files(self.data_root) if not path.is_file()]
        if self.init_from is not None:
            initial_file(self.init_from.path)
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


def _check_reporters(names: list[str]) -> None:
    if names == ["none"]:
        return
    if not names or "none" in names:
        raise ValueError(f"report_to: takes none alone or a list of reporters, got {names}")
    if len(set(names)) < len(names):
        raise ValueError(f"report_to: {names} names a reporter twice")
    _check_keys(names, sorted(INTEGRATION_TO_CALLBACK), "report_to")
    installed = get_available_reporting_integrations()
    for name in names:
        package = _PACKAGES.get(name, name)
        if name not in installed and find_spec(package) is None:
            raise ValueError(f"report_to: {name} is not installed; pip install {package}")


def _check_keys(values: Iterable[str], known: Sequence[str], name: str) -> None:
    for key in values:
        try:
            check_key(key, list(known))
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
