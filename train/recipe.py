"""Recipes: everything a training run is made of, as validated dataclasses read from YAML."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, WithJsonSchema
from pydantic.dataclasses import dataclass
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from layalign.configuration import SETTINGS, STAGES
from layalign.loading import DTYPES
from layalign.lora import check_installed, checked_lora
from layalign.quantization import checked_quantization, with_libraries
from layalign.spelling import long_dtype
from layalign.train.data.decontamination import Decontamination
from layalign.train.engines import read_deepspeed
from layalign.train.initial import initial_file
from layalign.train.parts import check_parts
from layalign.train.settings import (
    CONFIG,
    PathText,
    Settings,
    Switch,
    Whole,
    build,
    check_keys,
    one_of,
    one_or_several,
    override,
    read_yaml,
)
from layalign.train.stage_recipe import StageRecipe

SHIPPED = Path(__file__).parent / "recipes"
# Keys of a recipe of their own.
_NOT_MODEL_SETTINGS = ("llm_input", "quantization", "lora", "train_llm", "train_encoder")
# Where a reporter is not called like its package.
_PACKAGES = {"azure_ml": "azureml-core", "flyte": "flytekit"}
# Reporters that transformers has and does not list where their packages are.
_NOT_LISTED = {"flyte"}


StageName = Annotated[str, one_of(STAGES)]


@dataclass(config=CONFIG, kw_only=True, slots=True)
class InitFrom(Settings):
    """What the trained part starts from instead of random values."""

    path: PathText
    """The folder of a saved model, of a run, of a stage or of a checkpoint, or the published pytorch_model.bin."""
    only: Annotated[list[Literal["adapter", "aligner", "gates", "lora"]], one_or_several(str, of=str)] | None = None
    """Which of its parts are taken; None: all that it holds."""

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise ValueError("path: empty")
        if self.only is not None and not self.only:
            raise ValueError("only: empty list; adapter, aligner and gates are taken where it is left out")
        if self.only is not None and len(set(self.only)) < len(self.only):
            raise ValueError(f"only: {self.only} names a part twice")


@dataclass(config=CONFIG, kw_only=True, slots=True)
class FsdpOptions(Settings):
    """How FSDP2 shards, where its defaults do not fit."""

    reshard_after_forward: Switch = True
    """A block's weights are given up after its forward and gathered again for its backward pass; false: they stay from forward to
    backward, for less traffic and the memory of a whole model."""
    cpu_offload: Switch = False
    """Shards, gradients and the optimizer's state wait in the host's memory."""


_PATH_ALONE = BeforeValidator(
    lambda given: {"path": given} if isinstance(given, str) else given, json_schema_input_type=InitFrom | str | None
)


@dataclass(config=CONFIG, kw_only=True, slots=True)
class Recipe(Settings):
    """A training run."""

    _inner: ClassVar[Mapping[str, type]] = {"stages.NAME": StageRecipe}

    encoder: PathText | None = None
    """Name, folder or `layalign:NAME` of the frozen encoder; without one, an LLM alone is trained (`train_llm` or `lora`)."""
    llm: PathText
    """Name, folder or `layalign:NAME` of the LLM."""
    output: PathText
    """Folder of the run: its state while it runs, and the trained model in `output/model`."""
    stages: dict[StageName, StageRecipe]
    """The stages "translation" and "task", or one of them; always run in that order."""
    model: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `LayAlignForConditionalGeneration.from_bases` (aligner, adapter, gate, dtype, ...)."""
    llm_input: dict[StageName, Switch] = field(default_factory=dict)
    """Per stage, whether the LLM reads the prompt text as well."""
    quantization: Any = None
    """Of the bases: "4bit" or "8bit" for both bases, {llm: ..., encoder: ...}, or mappings with details; see
    `layalign.quantization.checked_quantization`."""
    lora: dict[str, Any] | None = None
    """LoRA on the LLM's attention, trained beside the trained part: {rank, alpha, dropout, targets}; see `layalign.lora.checked_lora`."""
    train_llm: Switch = False
    """The LLM's own weights are trained as well."""
    train_encoder: Annotated[Any, WithJsonSchema({"enum": [False, True, "embeddings"]})] = False
    """The encoder is trained as well, or its input embeddings alone."""
    init_from: Annotated[InitFrom | None, _PATH_ALONE] = None
    """What the trained part starts from: a path, or a path and which of its parts (`InitFrom`); None: random values."""
    seed: Annotated[Whole, Field(lt=2**31)] = 0
    """Of the trained part's first values and of the order of the data."""
    data_root: PathText | None = None
    """Folder that relative data paths start at; default: the current folder."""
    cache: PathText | None = None
    """Folder of the tokenised data that runs share (below it, in tokens); default: $LAYALIGN_CACHE, else ~/.cache/layalign."""
    decontaminate: Decontamination | None = None
    """Evaluation sets whose texts no stage trains on; None: nothing is looked for."""
    device: Literal["auto", "cpu"] = "auto"
    """What is trained on; "auto" takes an accelerator where there is one."""
    parallel: Literal["none", "ddp", "fsdp2", "deepspeed"] = "ddp"
    """What several processes (torchrun) share: "ddp": the batch; "fsdp2": the batch, and each holds a part of encoder, LLM and trained
    part; "deepspeed": as its configuration says; "none": more than one process is refused."""
    fsdp: FsdpOptions | None = None
    """Settings of fsdp2 (`FsdpOptions`)."""
    deepspeed: PathText | None = None
    """The values "zero2" or "zero3", or the path of a DeepSpeed configuration; "zero3" where nothing is said."""
    report_to: Annotated[list[str], one_or_several(str, of=str)] = field(default_factory=lambda: ["none"])
    """Where figures go: "none", "tensorboard", "wandb", "trackio" or another reporter known to transformers, or a list of them."""
    progress: Switch = True
    """Show a progress bar; false: print a line for each log instead."""

    def __post_init__(self) -> None:
        for key, engine in (("fsdp", "fsdp2"), ("deepspeed", "deepspeed")):
            if getattr(self, key) is not None and self.parallel != engine:
                raise ValueError(f"{key}: are settings of parallel: {engine}, but parallel is {self.parallel}")
        if self.deepspeed is not None:
            read_deepspeed(self.deepspeed)
        for name in ("encoder", "llm", "output"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise ValueError(f"{name}: empty")
        if not self.stages:
            raise ValueError(f"stages: at least one of {', '.join(STAGES)} is needed")
        own = [name for name in SETTINGS if name not in _NOT_MODEL_SETTINGS]
        check_keys(self.model, [*own, "dtype"], "model")
        if "dtype" in self.model:
            self.model = self.model | {"dtype": _dtype_name(self.model["dtype"])}
        self.llm_input = {"translation": False, "task": True} | self.llm_input
        self.quantization, self.lora = checked_quantization(self.quantization), checked_lora(self.lora)
        check_parts(self)
        # What is not installed is named before anything runs, and the library that quantises belongs to the run.
        self.quantization = with_libraries(self.quantization)
        if self.lora is not None:
            check_installed()
        for name, stage in self.stages.items():
            if self.llm_input[name] and stage.prompt is None:
                raise ValueError(
                    f"stages.{name}.prompt: required, as the LLM reads text in this stage (llm_input.{name} is true); "
                    'the question alone is "{source}"'
                )
            if stage.packing and (
                self.model.get("published_training") or self.model.get("mask_cross_padding") is False
            ):
                raise ValueError(
                    f"stages.{name}.packing: published_training and mask_cross_padding: false reproduce what padding does in the "
                    "published code; packed batches have none"
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
        for path in [] if self.decontaminate is None else self.decontaminate.located(self.data_root):
            missing += [] if path.is_file() else [f"decontaminate.files: {path}"]
        if self.init_from is not None:
            initial_file(self.init_from.path)
        if missing:
            shown = missing[:10] + ([f"and {len(missing) - 10} more"] if len(missing) > 10 else [])
            raise ValueError("data files not found (data_root is where relative paths start):\n  " + "\n  ".join(shown))


def _dtype_name(given: Any) -> str | None:
    """The name of `model.dtype`, given as a name, a short one or torch's own; None: as stored."""
    name = long_dtype(str(given).removeprefix("torch."))
    if given is None or name == "auto":
        return None
    if name not in DTYPES:
        raise ValueError(f"model.dtype: got {given!r}, takes {', '.join(DTYPES)} or auto (as stored)")
    return name


def load_recipe(path: str | os.PathLike, overrides: Iterable[str] = (), check_files: bool = True) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file, or the name of a shipped recipe ("math", "math_english", "math_qwen", "langbridge_english", "xcsqa",
            "xnli").
        overrides: "key=value" with dots between nested keys ("stages.task.data.limit=10"); values are read as YAML.
        check_files: also check that the data files exist.

    Raises:
        ValueError: no such file, broken YAML, an unknown key, a wrong value, or missing data files.
    """
    file, values = _find(path), read_recipe(path, overrides)
    try:
        recipe = build(Recipe, values)
        if check_files:
            recipe.check_files()
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return recipe


def read_recipe(path: str | os.PathLike, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The settings in a recipe's file as they stand there, unchecked; arguments as `load_recipe`'s.

    Raises:
        ValueError: no such file, or one that is no mapping in YAML.
    """
    file = _find(path)
    try:
        values = read_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: a recipe is a mapping of settings, got {type(values).__name__}")
    for assignment in overrides:
        override(values, assignment)
    return values


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
    check_keys(names, sorted(INTEGRATION_TO_CALLBACK), "report_to")
    for name in names:
        package = _PACKAGES.get(name, name)
        found = find_spec(package)
        # Without an origin it is a folder of that name in the current one, such as wandb leaves.
        missing = found is not None and found.origin is None
        try:
            known = not missing and name in get_available_reporting_integrations()
        except ImportError as error:
            raise ValueError(f"report_to: a reporter's package is broken: {error}") from error
        if missing or (found is None and not known):
            raise ValueError(f"report_to: {name} is not installed; pip install {package}")
        if not known and name not in _NOT_LISTED:
            raise ValueError(
                f"report_to: {name} is installed, but transformers finds it switched off by the environment or not set up"
            )


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors; train/recipes/schema.json is this."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | TypeAdapter(Recipe).json_schema()


if __name__ == "__main__":
    print(json.dumps(recipe_schema(), indent=1))
