"""How processes share the work of a step: DDP, FSDP2 or DeepSpeed, as a recipe asks for it through transformers' Trainer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from layalign.configuration import encoder_depth
from layalign.train.processes import on_cpu, precision_of, processes

if TYPE_CHECKING:
    from layalign.model import LayAlignForConditionalGeneration
    from layalign.train.recipe import Recipe
    from layalign.train.stage_recipe import StageRecipe

SHARDED = ("fsdp2", "deepspeed")
ZERO = Path(__file__).parent / "recipes" / "deepspeed"
# What an environment asks for by which variable (accelerate launch sets them); a recipe says it by `parallel`.
_ASKED_BY = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
# What the recipe's own keys say; a DeepSpeed file that said something else would contradict them.
_OF_THE_RECIPE = (
    "optimizer",
    "scheduler",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "torch_autocast",
)


def check_engine(recipe: Recipe) -> None:
    """Refuse, before anything is loaded, what would train otherwise than the recipe says.

    Raises:
        ValueError: an environment that asks for another engine, DeepSpeed that is not installed, sharding in one process, or
            several processes with `parallel: none`.
    """
    for variable, engine in _ASKED_BY.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise ValueError(
                f"parallel: the environment asks for {engine} ({variable}={os.environ[variable]}), and the recipe says "
                f"{recipe.parallel}: only the recipe is followed. Start with torchrun, without that variable, and set parallel "
                "to ddp, fsdp2 or deepspeed"
            )
    if recipe.parallel == "fsdp2" and (given := sorted(name for name in os.environ if name.startswith("FSDP_"))):
        raise ValueError(
            f"parallel: fsdp2 is set up by the recipe (fsdp), not by the environment; unset {', '.join(given)}"
        )
    if recipe.fsdp is not None and recipe.fsdp.cpu_offload and on_cpu(recipe):
        raise ValueError(
            "fsdp.cpu_offload: the processes train on the CPU, where their shards lie anyway; leave it out"
        )
    if recipe.parallel == "deepspeed" and find_spec("deepspeed") is None:
        raise ValueError("parallel: deepspeed is not installed; pip install deepspeed")
    if recipe.parallel == "deepspeed" and recipe.train_llm and _stage(read_deepspeed(recipe.deepspeed or "zero3")) == 3:
        raise ValueError(
            "train_llm: under ZeRO-3 a weight is given back before its gradient is made where it is used outside of its layer, as the "
            "aligner uses key and value weights; set parallel to fsdp2, or deepspeed to zero2"
        )
    count = processes(recipe).num_processes
    if recipe.parallel in SHARDED and count == 1:
        raise ValueError(
            f"parallel: {recipe.parallel} shards over processes, and there is one; start several (torchrun --nproc-per-node 8 -m "
            "layalign train ...), or set parallel to none"
        )
    if recipe.parallel in SHARDED and recipe.train_encoder:
        raise ValueError(f"train_encoder: is for parallel none and ddp; {recipe.parallel} shards frozen encoders")
    if recipe.parallel == "none" and count > 1:
        raise ValueError(f"parallel: none, but {count} processes were started; set it to ddp, fsdp2 or deepspeed")


@contextmanager
def own_environment() -> Iterator[None]:
    """Without the variables by which `accelerate launch` sets precision and compilation, which the recipe says. Afterwards those that
    transformers and accelerate set for an engine are put back: the next run of this process may be another's."""

    def ours() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith(("ACCELERATE_", "FSDP_"))}

    before = ours()
    for name in before:
        if name == "ACCELERATE_MIXED_PRECISION" or name.startswith("ACCELERATE_DYNAMO_"):
            del os.environ[name]
    try:
        yield
    finally:
        for name in ours().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def engine_arguments(recipe: Recipe, stage: StageRecipe, model: LayAlignForConditionalGeneration) -> dict[str, Any]:
    """What TrainingArguments are to say about the engine."""
    if recipe.parallel == "fsdp2":
        options = recipe.fsdp
        return {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": block_classes(model),
                "reshard_after_forward": options is None or options.reshard_after_forward,
                "cpu_offload": options is not None and options.cpu_offload,
                "cpu_ram_efficient_loading": False,  # it would ask the bases to lie on meta, where ties are lost
                "state_dict_type": "FULL_STATE_DICT",
            },
        }
    if recipe.parallel == "deepspeed":
        config = read_deepspeed(recipe.deepspeed or "zero3")
        width = model.config.get_text_config().hidden_size
        # accelerate fills these in by a model's hidden_size, and ours has two.
        sizes = {
            "reduce_bucket_size": width * width,
            "stage3_prefetch_bucket_size": 9 * width * width // 10,
            "stage3_param_persistence_threshold": 10 * width,
        }
        zero = config["zero_optimization"]
        config["zero_optimization"] = {
            key: sizes.get(key, value) if value == "auto" else value for key, value in zero.items()
        }
        autocast = {
            "enabled": precision_of(recipe, stage) == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
        filled = (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
        )
        # bf16 of DeepSpeed's own would turn the trained part to bf16; autocast leaves it in fp32, as without DeepSpeed.
        return {"deepspeed": config | dict.fromkeys(filled, "auto") | {"torch_autocast": autocast}, "bf16": False}
    return {}


def block_classes(model: LayAlignForConditionalGeneration) -> list[str]:
    """The classes of the blocks that encoder and LLM are made of, each in a list as long as its base is deep.

    Raises:
        ValueError: a base without such a list.
    """
    text = model.config.get_text_config()
    depths = {"llm": (model.llm, text.num_hidden_layers)}
    if model.encoder is not None:
        depths["encoder"] = (model.encoder, encoder_depth(model.encoder.config))
    found: dict[str, set[str]] = {}
    for role, (base, depth) in depths.items():
        lists = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
        # The outermost list: a block may hold a list of as many parts.
        found[role] = {type(block).__name__ for block in lists[0]} if lists else set()
        if not found[role]:
            raise ValueError(
                f"parallel: fsdp2 shards the {role} by its blocks, and {type(base).__name__} has no list of {depth} of them"
            )
    return sorted(set.union(*found.values()))


def _stage(config: Any) -> Any:
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return zero.get("stage") if isinstance(zero, dict) else None


def read_deepspeed(name: str) -> dict[str, Any]:
    """A DeepSpeed configuration: one of ours by name ("zero2", "zero3"), or a JSON file.

    Raises:
        ValueError: no such file, not such a configuration, or one that says what the recipe says.
    """
    shipped = ZERO / f"{name}.json"
    file = shipped if shipped.parent == ZERO and shipped.is_file() else Path(name).expanduser()
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        known = ", ".join(sorted(path.stem for path in ZERO.glob("*.json")))
        raise ValueError(f"deepspeed: takes {known} or the path of a JSON file, got {name!r}: {error}") from None
    if _stage(config) not in (1, 2, 3):
        raise ValueError(f"deepspeed: {name} has no zero_optimization with a stage of 1, 2 or 3")
    if said := [key for key in _OF_THE_RECIPE if config.get(key, "auto") != "auto"]:
        raise ValueError(f"deepspeed: {name} sets {', '.join(said)}, which the recipe's own keys say; leave them out")
    return {key: value for key, value in config.items() if key not in _OF_THE_RECIPE}
