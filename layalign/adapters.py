"""Adapters that PEFT's own means have put on an LLM, or on a whole model: taken up as our LoRA, or refused before they are lost."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from layalign.lora import NAME

KINDS = (
    "LayAlign takes up one plain LoRA: linear layers in the decoder, one rank and scale, no DoRA, no biases, no further modules; merge it "
    "into the LLM (merge_and_unload), or give the bare LLM and the setting lora="
)
# Beginnings of LoRA that take something out of the LLM's own weights.
_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_NONE_OF = ("modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication")


class TakenAdapter:
    """An adapter taken off an LLM, to be put on again as LayAlign's own LoRA, with the same weights.

    Args:
        llm: with exactly this adapter, which is taken off; the layers are what they were before PEFT.
        name: PEFT's name for it.

    Attributes:
        settings: LayAlign's setting `lora`.

    Raises:
        ValueError: one that LayAlign has no settings for; the LLM stays as it is.
    """

    def __init__(self, llm: nn.Module, name: str):
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._llm, self._configs = llm, getattr(llm, "peft_config")  # noqa: B009 PEFT puts it there
        layers: dict[str, Any] = {
            path: module for path, module in llm.named_modules() if isinstance(module, BaseTunerLayer)
        }
        self.settings = _settings(llm, layers, self._configs[name], name)
        self._weights = {
            f"{path}.{part}.{NAME}.{tensor}": value.detach()
            for path, module in layers.items()
            for part in ("lora_A", "lora_B")
            for tensor, value in getattr(module, part)[name].named_parameters()
        }
        self._layers = layers
        for path, module in layers.items():
            _put(llm, path, module.get_base_layer())
        del llm.peft_config
        self._loaded = vars(llm).pop("_hf_peft_config_loaded", None)

    def __enter__(self) -> TakenAdapter:
        """The LLM is bare; LayAlign's own LoRA is to be put on it by these settings."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        """Give that LoRA this adapter's weights, in fp32; after an error leave the LLM as it came."""
        if kind is None:
            for path, value in self._weights.items():
                self._llm.get_parameter(path).data.copy_(value)
            return
        for path, module in self._layers.items():
            _put(self._llm, path, module)
        vars(self._llm).update(peft_config=self._configs)
        if self._loaded is not None:
            vars(self._llm).update(_hf_peft_config_loaded=self._loaded)


def unwrapped(llm: Any) -> Any:
    """The LLM in a PeftModel of LoRA, with the adapter's layers; anything else as it is.

    Raises:
        ValueError: a PeftModel of another method, of which something lies outside the LLM's layers.
    """
    configs: Any = getattr(llm, "peft_config", None)
    if not isinstance(llm, nn.Module) or configs is None or not hasattr(llm, "get_base_model"):
        return llm
    kinds = sorted({str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()})
    if kinds != ["LORA"]:
        raise ValueError(f"llm: got a PeftModel of {', '.join(kinds)}; {KINDS}")
    whole: Any = llm
    return whole.get_base_model()


def take_adapter(llm: Any) -> TakenAdapter | None:
    """The adapter of an LLM that is no model's yet, taken off; None: it has none.

    Raises:
        ValueError: several, or one that LayAlign has no settings for.
    """
    names = list(getattr(llm, "peft_config", None) or ())
    if not names or any(path.endswith(".fusion_gate") for path, _ in llm.named_modules()):
        return None
    if len(names) > 1:
        raise ValueError(f"llm: this {type(llm).__name__} has several adapters ({', '.join(names)}); {KINDS}")
    return TakenAdapter(llm, names[0])


def check_adapters(model: Any, saving: bool) -> None:
    """Before a model is trained or saved.

    Args:
        model: a LayAlign model.
        saving: whether it is about to be saved.

    Raises:
        ValueError: adapters that were put on its LLM since it was made, or, to be saved, on the whole model: they would not be saved.
    """
    if others := [name for name in getattr(model.llm, "peft_config", None) or () if name != NAME]:
        raise ValueError(
            f"the LLM has adapters ({', '.join(others)}) that this model does not train or save; give from_bases the LLM with its adapter, "
            "or the setting lora="
        )
    if not getattr(model, "peft_config", None):
        return
    if saving:
        raise ValueError(
            "PEFT has put adapters on this whole model, and its names are PEFT's now: save the PeftModel, or merge_and_unload() it first"
        )
    trained = [name for name, own in model.named_parameters() if own.requires_grad]
    if not any(name.startswith(("adapter.", "aligner.")) for name in trained):
        warnings.warn(
            "PEFT has frozen the trained part, adapter, aligner and gates, and does not save it; to train it: "
            'modules_to_save=["adapter", "aligner", "fusion_gate"] in PEFT\'s configuration',
            stacklevel=3,
        )
    if any(name.startswith("encoder.") for name in trained):
        warnings.warn(
            "PEFT has put adapters on the encoder, which runs without gradient: they learn nothing; name the LLM's layers, "
            r'target_modules=r"llm\..*\.(q_proj|v_proj)"',
            stacklevel=3,
        )


def _settings(llm: nn.Module, layers: dict[str, Any], config: Any, name: str) -> dict[str, Any]:
    """LayAlign's setting `lora` for an adapter."""
    from peft.tuners.lora import LoraLayer

    from layalign.lora import target_layers

    odd = [key for key in _NONE_OF if getattr(config, key, None)]
    odd += ["bias"] if getattr(config, "bias", "none") != "none" else []
    if str(begins := getattr(config, "init_lora_weights", True)).lower().startswith(_CHANGING):
        odd.append(f"init_lora_weights={begins!r}, which has changed the LLM's own weights")
    plain = {
        path
        for path, layer in layers.items()
        if isinstance(layer, LoraLayer)
        and name in layer.lora_A
        and not layer.use_dora.get(name)
        and name not in getattr(layer, "lora_variant", {})
        and not (getattr(layer, "lora_bias", None) or {}).get(name)
        and not layer.merged_adapters
    }
    odd += sorted(layers.keys() - plain)[:1]
    scales = {(layers[path].r[name], layers[path].scaling[name]) for path in plain}
    dropouts = {getattr(layers[path].lora_dropout[name], "p", 0.0) for path in plain}
    if len(scales) > 1 or len(dropouts) > 1:
        odd.append("several ranks or scales")
    paths = sorted(plain)
    bare = {
        path.replace(".base_layer", ""): module for path, module in target_layers(llm, None, everything=True).items()
    }
    odd += [path for path in paths if path not in bare][:1]
    if odd or not paths:
        raise ValueError(
            f"llm: the adapter {name!r} of this {type(llm).__name__} has {', '.join(odd) or 'no layers'}; {KINDS}"
        )
    ((rank, scale),), (dropout,) = scales, dropouts
    last = sorted({path.rpartition(".")[2] for path in paths})
    whole = sorted(path for path in bare if path.rpartition(".")[2] in last)
    alpha = rank * scale
    alpha = int(alpha) if float(alpha).is_integer() else float(alpha)
    return {"rank": rank, "alpha": alpha, "dropout": float(dropout), "targets": last if whole == paths else paths}


def _put(llm: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(llm.get_submodule(parent), child, module)
