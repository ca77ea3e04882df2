"""`fuse` and `unfuse`: gated cross-attention on any transformers causal LM, with cross states of the caller's own.

The LLM object is patched, not its class: two bound methods take `cross_states` and `cross_mask`, the attention function becomes
LayAlign's. What was there before is written down on the LLM itself, so that a deep copy has all of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from layalign import families
from layalign import fusion as swap
from layalign.configuration import BACKENDS, GATES
from layalign.kernels.dispatch import malformed
from layalign.own_states import Fusion, OwnCrossStates, PreparedCross, States, own_gate_hook
from layalign.projections import attention_modules, key_value_projections

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "max_length_q", "max_length_k")


@dataclass
class Patched:
    """What `fuse` has changed of an LLM.

    Attributes:
        fusion: the trained part.
        before, patches: attributes of the LLM object, by name, as they were (None: its class's) and as they are.
        implementations: its configurations and the attention implementation that each named.
        flags: requires_grad of its parameters by name; None: left alone.
        hooks: handles of the hooks on its layers and attention modules.
        seen: whether a forward call has shown that every fused layer takes part.
    """

    fusion: Fusion
    before: dict[str, Any]
    patches: dict[str, Any]
    implementations: list[tuple[PreTrainedConfig, str | None]]
    flags: dict[str, bool] | None
    hooks: list[Any]
    seen: bool = False


def fuse(
    llm: PreTrainedModel,
    *,
    cross_size: int | None = None,
    layers: Sequence[int] | None = None,
    gate: str = "scalar",
    backend: str = "auto",
    freeze: bool = True,
) -> Fusion:
    """Put gated cross-attention on a causal LM of transformers: an image or audio encoder's states, retrieved documents.

    Afterwards `llm(input_ids, cross_states=..., cross_mask=...)` and `llm.generate(input_ids, cross_states=..., cross_mask=...)` read
    states (B, T, De) beside their text. The LLM's own key and value projections make cross keys and values of them, as in
    LayAlign, and each fused layer adds its gate times what its queries find there. The gates are 0 at first: training begins at
    the bare LLM, and without cross_states it stays that.

    Args:
        llm: any whose attention goes through transformers' interface. It is patched in place, where it lies; move it first.
        cross_size: De; a trained linear layer then maps the states to the LLM's width Dl. None: they have that width already.
        layers: indices of the layers to fuse; None: all.
        gate: "scalar" (one a layer), "head" (one a query head) or "dynamic" (made of the layer's hidden state).
        backend: of the operator, see `adaptive_fusion_attention`.
        freeze: take the gradients off the LLM's parameters; `unfuse` gives them back.

    Returns:
        The trained part, in fp32: `parameters()` for an optimizer, `save` and `load`, and a call of it makes keys and values that
        many forward calls share.

    Raises:
        ValueError: an LLM that is fused already, is part of a LayAlign model, is no causal LM or has another kind of attention, or a
            wrong setting. A family that ignores the attention function shows it in the first call with cross states, a RuntimeError.
    """
    _check_llm(llm)
    text = llm.config.get_text_config(decoder=True)
    chosen = _checked_layers(layers, text.num_hidden_layers)
    if gate not in GATES:
        raise malformed("gate", repr(gate), f"one of {GATES}")
    if backend not in BACKENDS:
        raise malformed("backend", repr(backend), f"one of {BACKENDS}")
    if cross_size is not None and (not isinstance(cross_size, int) or isinstance(cross_size, bool) or cross_size < 1):
        raise malformed("cross_size", repr(cross_size), "the width of the cross states, a positive int, or None")
    modules = attention_modules(llm)
    projections = key_value_projections(llm, chosen)
    sizes = {"heads": text.num_attention_heads, "llm": text.hidden_size, "cross": cross_size}
    fusion = Fusion(projections, chosen, sizes, gate, backend, llm.dtype)
    if llm.device.type != "meta":  # else its weights are offloaded
        fusion.to(llm.device)
    implementations = [(config, config._attn_implementation) for config in _configurations(llm)]
    try:
        swap.swap_attention(llm)
    except BaseException:
        _restore(implementations)
        raise
    hooks = families.bring_arguments(llm, [modules[layer] for layer in chosen])
    if gate == "dynamic":
        hooks += [modules[layer].register_forward_pre_hook(own_gate_hook, with_kwargs=True) for layer in chosen]
    flags = {name: parameter.requires_grad for name, parameter in llm.named_parameters()} if freeze else None
    if freeze:
        llm.requires_grad_(False)
    patches = {
        "forward": _with_cross_states(_forward, llm, "forward"),
        "generate": _with_cross_states(_generate, llm, "generate"),
        # transformers calls it for static caches; the fused attention takes the 2-D mask as it is.
        "create_masks_for_generate": MethodType(_two_dimensional_mask, llm),
    }
    before = {name: vars(llm).get(name) for name in patches}
    setattr(llm, swap.FUSED, Patched(fusion, before, patches, implementations, flags, hooks))
    for name, patch in patches.items():
        setattr(llm, name, patch)
    try:
        families.check_unproven(llm, projections)
    except BaseException:
        unfuse(llm)
        raise
    return fusion


def unfuse(llm: PreTrainedModel) -> PreTrainedModel:
    """The LLM as it was before `fuse`: methods, attention implementation, hooks, gradients of its parameters.

    Args:
        llm: a fused one. What `fuse` returned keeps its weights.

    Raises:
        ValueError: an LLM that is not fused, or one that something else has wrapped since (accelerate's hooks), which must go first.
    """
    patched = vars(llm).get(swap.FUSED) if isinstance(llm, torch.nn.Module) else None
    if patched is None:
        raise ValueError(f"unfuse: got {_called(llm)} that is not fused, takes an LLM that layalign.fuse has fused")
    covered = [name for name, patch in patched.patches.items() if vars(llm).get(name) != patch]
    if covered:
        raise ValueError(
            f"unfuse: {', '.join(covered)} of this {type(llm).__name__} was replaced after fuse (by accelerate's hooks?); undo that "
            "first, else it would be lost"
        )
    for name, value in patched.before.items():
        if value is None:
            delattr(llm, name)
        else:
            setattr(llm, name, value)
    for hook in patched.hooks:
        hook.remove()
    _restore(patched.implementations)
    if patched.flags is not None:
        for name, parameter in llm.named_parameters():
            parameter.requires_grad_(patched.flags.get(name, parameter.requires_grad))
    delattr(llm, swap.FUSED)
    return llm


def _forward(
    llm: Any, cross_states: Any, cross_mask: torch.Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    patched = getattr(llm, swap.FUSED)
    swap.check_swapped(llm)
    _check_call(llm, kwargs)
    rows = _rows(args, kwargs)
    prepared = _prepared(patched.fusion, cross_states, cross_mask)
    if rows is not None and (
        rows != prepared.rows if cross_states is not prepared else prepared.rows == 0 or rows % prepared.rows
    ):
        raise malformed("cross_states", f"{prepared.rows} rows", f"one for each of the {rows} rows of the text")
    states = OwnCrossStates(prepared, patched.fusion)
    out = _original(llm, "forward")(*args, fusion=states, **kwargs)
    prepared.uses += 1
    if not patched.seen:
        swap.check_used(llm, states)
        patched.seen = True
    return out


def _generate(
    llm: Any, cross_states: Any, cross_mask: torch.Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if kwargs.get("assistant_model") is not None:
        raise ValueError(
            "assistant_model: a draft model would not see the cross states; use prompt_lookup_num_tokens instead"
        )
    with torch.no_grad():
        prepared = _prepared(getattr(llm, swap.FUSED).fusion, cross_states, cross_mask)
    rows = _rows(args, kwargs)
    if rows is not None and rows != prepared.rows:
        raise malformed("cross_states", f"{prepared.rows} rows", f"one for each of the {rows} rows of the text")
    before = prepared.uses
    # No tensor: transformers repeats tensors for beams and samples, which share these.
    out = _original(llm, "generate")(*args, cross_states=prepared, **kwargs)
    if prepared.uses == before:
        raise RuntimeError(
            f"{type(llm).__name__}.generate did not hand the cross states on to its forward call; decode with llm(...) step by step"
        )
    return out


def _two_dimensional_mask(llm: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    return swap.mask_of_cache(attention_mask, **kwargs)


def _with_cross_states(function: Any, llm: Any, name: str) -> MethodType:
    """A bound method of the LLM whose signature is that of its own, with `cross_states` and `cross_mask`: transformers and its Trainer
    look there for what a model takes. A function of its own for each LLM, bound to it, which a deep copy binds anew."""
    original = getattr(llm, name)

    def method(
        self: Any, *args: Any, cross_states: Any = None, cross_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        if cross_states is not None:
            return function(self, cross_states, cross_mask, args, kwargs)
        if cross_mask is not None:
            raise malformed("cross_mask", "a mask without cross_states", "both, or neither")
        return _original(self, name)(*args, **kwargs)

    own = list(inspect.signature(original).parameters.values())
    kind = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter(new, kind, default=None) for new in ("cross_states", "cross_mask")]
    rest = [parameter for parameter in own if parameter.kind is inspect.Parameter.VAR_KEYWORD]
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [parameter for parameter in own if parameter not in rest]
    method.__name__ = name
    method.__doc__ = original.__doc__
    method.__signature__ = inspect.Signature([first, *positional, *added, *rest])  # type: ignore[attr-defined]
    return MethodType(method, llm)


def _original(llm: Any, name: str) -> Any:
    """The method as it was before."""
    value = getattr(llm, swap.FUSED).before[name]
    return getattr(type(llm), name).__get__(llm) if value is None else value


def _prepared(fusion: Fusion, states: States | PreparedCross, mask: torch.Tensor | None) -> PreparedCross:
    if not isinstance(states, PreparedCross):
        return fusion(states, mask)
    if mask is not None:
        raise malformed("cross_mask", "a mask beside cross keys and values", "None: they bring theirs")
    if len(states.keys) != len(fusion.layers):
        raise malformed("cross_states", f"keys of {len(states.keys)} layers", f"those of {len(fusion.layers)}")
    return states


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """How many rows of text a call has, where it gives any."""
    given = [*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds"))]
    return next((len(tensor) for tensor in given if isinstance(tensor, torch.Tensor)), None)


def _check_llm(llm: Any) -> None:
    if not isinstance(llm, PreTrainedModel) or not llm.can_generate() or llm.config.is_encoder_decoder:
        raise ValueError(
            f"fuse: got {_called(llm)}, takes a causal LM of transformers (of a PeftModel: its get_base_model())"
        )
    swap.check_free(llm)
    text = llm.config.get_text_config(decoder=True)
    if swap.NAME in (llm.config.model_type, text._attn_implementation):
        raise ValueError(
            "fuse: this LLM is part of a LayAlign model, which has cross-attention of its own; load the LLM once more"
        )


def _check_call(llm: Any, kwargs: dict[str, Any]) -> None:
    """What cannot go with cross states."""
    if packed := [name for name in PACKED if kwargs.get(name) is not None]:
        raise ValueError(
            f"{', '.join(packed)}: packed sequences cannot be told their part of cross_states; give a row each"
        )
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: the fused attention makes no weights; leave it out")
    decoder = llm.get_decoder()
    if llm.training and getattr(decoder, "gradient_checkpointing", False):
        checkpoint = getattr(decoder, "_gradient_checkpointing_func", None)
        if getattr(checkpoint, "keywords", {}).get("use_reentrant", True):
            raise ValueError("gradient checkpointing needs use_reentrant=False: all layers share the cross states")


def _checked_layers(layers: Sequence[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    chosen = list(layers)
    right = all(isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < count for layer in chosen)
    if not chosen or not right or len(set(chosen)) < len(chosen):
        raise malformed("layers", chosen, f"distinct indices from 0 to {count - 1}, at least one, or None for all")
    return sorted(chosen)


def _configurations(llm: PreTrainedModel) -> list[PreTrainedConfig]:
    """Its configuration and all inside, those of its submodels too, each once: the outer before the inner."""
    found: dict[int, PreTrainedConfig] = {}
    waiting = [module.config for module in llm.modules() if isinstance(module, PreTrainedModel)]
    while waiting:
        config = waiting.pop(0)
        if id(config) not in found:
            found[id(config)] = config
            inner = [getattr(config, name, None) for name in config.sub_configs]
            waiting += [part for part in inner if isinstance(part, PreTrainedConfig)]
    return list(found.values())


def _restore(implementations: list[tuple[PreTrainedConfig, str | None]]) -> None:
    """Setting an outer configuration's sets the inner ones' too, which come later."""
    for config, implementation in implementations:
        config._attn_implementation = implementation


def _called(given: object) -> str:
    name = type(given).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
