"""LoRA on the LLM, by PEFT: low-rank changes of its projections, trained and saved with the trained part."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layalign.projections import attention_modules
from layalign.spelling import did_you_mean_or_known

# PEFT's name for our adapter, which stands in the names of its weights: others' adapters on an LLM are not ours to train.
NAME = "layalign"
# After these names of a state dict a tensor is one of our adapter's.
OURS = re.compile(rf"\.lora_\w+\.{NAME}(\.|$)")
DEFAULTS: dict[str, Any] = {"rank": 16, "alpha": None, "dropout": 0.0, "targets": None}


def checked_lora(value: Any) -> dict[str, Any] | None:
    """Settings of LoRA, whole; None: none.

    Args:
        value: a mapping of rank (default 16), alpha (the change is scaled by alpha / rank; default: twice the rank), dropout
            (default 0) and targets (last or whole names of linear layers in the LLM's decoder; default: all of its attention).

    Raises:
        ValueError: anything else.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"lora: takes a mapping of {', '.join(DEFAULTS)}, got {value!r}")
    for key in value:
        if key not in DEFAULTS:
            raise ValueError(f"lora.{key}: unknown setting{did_you_mean_or_known(key, DEFAULTS)}")
    settings = DEFAULTS | value
    rank, dropout, targets = settings["rank"], settings["dropout"], settings["targets"]
    if type(rank) is not int or rank < 1:
        raise ValueError(f"lora.rank: must be a whole number from 1, got {rank!r}")
    if settings["alpha"] is None:
        settings["alpha"] = 2 * rank
    if not _is_number(settings["alpha"]) or settings["alpha"] <= 0:
        raise ValueError(f"lora.alpha: must be a number above 0, got {settings['alpha']!r}")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"lora.dropout: must be a number from 0 to below 1, got {dropout!r}")
    if isinstance(targets, str):
        settings["targets"] = targets = [targets]
    if targets is not None and not (
        isinstance(targets, (list, tuple)) and all(isinstance(one, str) for one in targets)
    ):
        raise ValueError(f"lora.targets: must be a list of names of linear layers, got {targets!r}")
    if targets is not None and (not targets or len(set(targets)) < len(targets)):
        raise ValueError(f"lora.targets: must be distinct names, at least one, got {list(targets)}")
    return settings


def check_installed() -> None:
    """Look for PEFT.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError('lora: needs peft, which is not installed: pip install "layalign[lora]"') from error


def check_bare(llm: PreTrainedModel) -> None:
    """Before an LLM becomes part of a model.

    Raises:
        ValueError: it has adapters.
    """
    if present := getattr(llm, "peft_config", None):
        raise ValueError(
            f"lora: this {type(llm).__name__} has adapters already ({', '.join(present)}); give it without, or merge them into it"
        )


def add_lora(llm: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Put fresh adapters, which change nothing yet, on an LLM's layers. Their weights are fp32, whatever the layers' are.

    Args:
        llm: the LLM; its modules keep their names, the adapted layers become PEFT's.
        settings: of `checked_lora`.

    Raises:
        ValueError: no PEFT, targets that are no linear layers of this LLM, or an LLM that has adapters already.
    """
    check_installed()
    from peft import LoraConfig, inject_adapter_in_model

    check_bare(llm)
    chosen = target_layers(llm, settings["targets"])
    config = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=sorted(chosen),
        fan_in_fan_out=all(isinstance(module, Conv1D) for module in chosen.values()),
    )
    inject_adapter_in_model(config, llm, adapter_name=NAME)
    for name, parameter in llm.named_parameters():
        if OURS.search(name):
            parameter.data = parameter.data.float()


def merge_lora(llm: PreTrainedModel) -> None:
    """Add the adapters' changes to the weights of their layers, which become what they were before `add_lora`.

    Raises:
        ValueError: quantised layers, which would round the changes away, or changes that are not finite.
    """
    from peft.tuners.lora import LoraLayer

    adapted = [
        (name, module)
        for name, module in llm.named_modules()
        if isinstance(module, LoraLayer) and NAME in module.lora_A
    ]
    for name, module in adapted:
        weight = module.get_base_layer().weight
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise ValueError(
                f"merge_lora: {name} is quantised, and rounding would change what was trained; load the model with quantization='none'"
            )
    for name, module in adapted:
        module.merge(safe_merge=True, adapter_names=[NAME])
        parent, _, child = name.rpartition(".")
        setattr(llm.get_submodule(parent), child, module.get_base_layer())
    if adapted:
        del llm.peft_config


def target_layers(llm: PreTrainedModel, targets: list[str] | None, everything: bool = False) -> dict[str, Any]:
    """The linear layers of an LLM's decoder to adapt, by their names in the LLM.

    Args:
        llm: the LLM.
        targets: last names or whole names; None: those of the attention modules.
        everything: all linear layers there are.

    Raises:
        ValueError: names that there are not.
    """
    decoder = llm.get_decoder()
    prefix = next(name for name, module in llm.named_modules() if module is decoder)
    linear = {
        name: module
        for name, module in decoder.named_modules(prefix=prefix)
        if _is_linear(module) and "fusion_gate" not in name
    }
    if everything:
        return linear
    if targets is None:
        inside = {part for module in attention_modules(llm).values() for part in module.modules()}
        return {name: module for name, module in linear.items() if module in inside}
    known = sorted({name.rpartition(".")[2] for name in linear})
    if unknown := [target for target in targets if target not in known and target not in linear]:
        raise ValueError(
            f"lora.targets: {', '.join(unknown)}: no such linear layer in {type(llm).__name__}; it has {', '.join(known)}"
        )
    return {name: module for name, module in linear.items() if {name, name.rpartition(".")[2]} & set(targets)}


def _is_linear(module: Any) -> bool:
    """Of torch, of transformers' Conv1D, or one that a library of quantised layers has put in its place."""
    return isinstance(module, (nn.Linear, Conv1D)) or torch.is_tensor(getattr(module, "qweight", None))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
