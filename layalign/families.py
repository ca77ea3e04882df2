"""LLM families: how their attention modules make keys and values, a table that `register` adds to, and a check of what it says.

Most families need no entry: `k_proj` and `v_proj`, or one projection of queries, keys and values, with or without a norm of keys.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from layalign.family_table import TABLE
from layalign.fusion import FusionMask

if TYPE_CHECKING:
    from layalign.projections import KeyValueProjection

logger = logging.get_logger(__name__)

ORDERS = ("apart", "joined", "by_head")
# Names under which attention modules keep a norm of their keys.
NORMS = ("k_norm", "k_layernorm", "key_layernorm")


@dataclass(frozen=True)
class KeyValueLayout:
    """How an attention class makes its keys and values of a hidden state, RoPE apart.

    Attributes:
        names: its key and value projection, or the one that queries, keys and values share.
        order: "apart": two projections; "joined": one, whose output is queries, keys, values one after the other; "by_head": one,
            whose output is queries, keys, values of the first head, then of the second, and so on.
        key_norm: name of the module that norms the keys; None: there is none.
        heads_first: the norm takes keys (B, Hkv, T, D); else it takes them as its weight tells, (B, T, Hkv, D) or (B, T, kv).
        adjust: what is done besides: a function of the attention module, keys and values, both (B, T, Hkv, D), that returns both.
        passes_arguments: False where the decoder layer does not hand its keyword arguments on to the attention module; LayAlign
            then brings its own there.
        heads: of the keys; None: as the LLM's configuration says.

    Raises:
        ValueError: an order that there is not, or names that do not go with it.
    """

    names: tuple[str, ...] = ("k_proj", "v_proj")
    order: str = "apart"
    key_norm: str | None = None
    heads_first: bool = False
    adjust: Callable[[Any, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
    passes_arguments: bool = True
    heads: int | None = None

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order: got {self.order!r}, takes one of {', '.join(ORDERS)}")
        wanted = 2 if self.order == "apart" else 1
        if isinstance(self.names, str) or len(self.names) != wanted:
            raise ValueError(f"names: order {self.order!r} takes {wanted} of them in a tuple, got {self.names!r}")


Layout = KeyValueLayout | Callable[[Any], KeyValueLayout]


def register(attention: type | str, layout: Layout) -> None:
    """Say how an attention class makes its keys and values, before a model is made of an LLM that has it.

    The class needs a `layer_idx` and must call transformers' attention interface with keyword arguments that it was given.
    `check` tells whether the layout is right.

    Args:
        attention: the class, or its name.
        layout: a KeyValueLayout, or a function of the module that returns one.

    Raises:
        ValueError: neither of both.
    """
    if not (isinstance(layout, KeyValueLayout) or (callable(layout) and not isinstance(layout, type))):
        raise ValueError(f"layout: takes a KeyValueLayout or a function that returns one, got {layout!r}")
    name = attention if isinstance(attention, str) else getattr(attention, "__name__", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"attention: takes a class or its name, got {attention!r}")
    _LAYOUTS[name] = layout


def is_registered(attention: Any) -> bool:
    """Whether there is an entry for an attention module's class."""
    return _class_name(attention) in _LAYOUTS


def layout_of(attention: Any) -> KeyValueLayout:
    """The layout of an attention module: its class's entry, or what the names of its projections and norms say.

    Raises:
        ValueError: no entry, and projections or norms that we cannot read.
    """
    layout = _LAYOUTS.get(_class_name(attention))
    if layout is not None:
        return layout if isinstance(layout, KeyValueLayout) else layout(attention)
    return _usual(attention)


def _class_name(attention: Any) -> str:
    kind = type(attention)
    return kind.__bases__[-1].__name__ if kind.__name__.startswith("FSDP") else kind.__name__


def _usual(attention: Any, **more: Any) -> KeyValueLayout:
    """The layout that the names of projections and norms say."""
    children = {name for name, _ in attention.named_children()}
    if "kv_b_proj" in children:
        raise ValueError(
            f"{_class_name(attention)}: in latent attention (MLA) a part of the keys is only made with RoPE, which cross keys have not"
        )
    norms = [name for name in NORMS if getattr(attention, name, None) is not None]
    unread = sorted(name for name in children if "norm" in name and name.startswith(("v", "kv", "qk")))
    if unread or len(norms) > 1:
        raise ValueError(
            f"{_class_name(attention)}: its {', '.join(unread or norms)} is not a norm of keys that {ADVICE}"
        )
    given = {"key_norm": norms[0] if norms else None} | more
    for names, order in (
        (("k_proj", "v_proj"), "apart"),
        (("qkv_proj",), "joined"),
        (("c_attn",), "joined"),
        (("query_key_value",), "by_head"),
    ):
        modules = [getattr(attention, name, None) for name in names]
        # A c_attn that is no Conv1D is another family's.
        if None not in modules and not (names == ("c_attn",) and isinstance(modules[0], torch.nn.Linear)):
            return KeyValueLayout(names, order, **given)
    raise ValueError(
        f"{_class_name(attention)}: no k_proj/v_proj, qkv_proj, c_attn or query_key_value linear layer that {ADVICE}"
    )


ADVICE = "LayAlign could project cross states with; `layalign.families.register` tells it how such a class makes keys and values"


def _clipped(attention: Any, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    most = attention.config.clip_qkv
    return keys.clamp(-most, most), values.clamp(-most, most)


def _clipping(attention: Any) -> KeyValueLayout:
    return _usual(attention, adjust=None if attention.config.clip_qkv is None else _clipped)


def _scaled(attention: Any, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return keys * attention.key_multiplier, values


def _scaling(attention: Any) -> KeyValueLayout:
    return _usual(attention, adjust=_scaled)


def _big_code(attention: Any) -> KeyValueLayout:
    return KeyValueLayout(("c_attn",), "joined" if attention.multi_query else "by_head", heads=attention.kv_heads)


def _refused(why: str) -> Callable[[Any], KeyValueLayout]:
    def refuse(attention: Any) -> KeyValueLayout:
        raise ValueError(f"{_class_name(attention)}: {why}")

    return refuse


# Attention classes that the names of their modules do not tell all about.
_LAYOUTS: dict[str, Layout] = {
    # By its name: quantised, its Conv1D is a linear layer.
    "GPT2Attention": KeyValueLayout(("c_attn",), "joined"),
    "GPTBigCodeAttention": _big_code,
    "OlmoAttention": _clipping,
    "OlmoeAttention": _clipping,
    "FalconH1Attention": _scaling,
    "StableLmAttention": lambda attention: _usual(attention, heads_first=True, passes_arguments=False),
    "NemotronAttention": lambda attention: _usual(attention, passes_arguments=False),
    "DiffLlamaAttention": _refused("its difference of two attentions has no place for a gated cross term"),
    "DogeAttention": _refused("its mask depends on the values, which LayAlign's fused attention cannot do"),
    "Llama4TextAttention": _refused(
        "its chunked attention is a pattern that LayAlign's fused attention does not cover"
    ),
}


@cache
def table() -> dict[str, Any]:
    """The table that the tests made: of LLMs and encoders, what of LayAlign is proven with each family."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def check_unproven(llm: Any, projections: Sequence[KeyValueProjection]) -> None:
    """`check` for attention classes that no test has seen, where their weights can be looked at; elsewhere a warning. Called where
    cross-attention is put on an LLM: in a forward call other threads' calls would see the probe.

    Raises:
        ValueError: as `check`.
    """
    proven = {name for family in table()["llms"].values() for name in family["attention"]}
    unproven = [one for one in projections if _class_name(one.attention) not in proven]
    if not unproven:
        return
    if any(one.is_sharded for one in unproven) or any(parameter.is_meta for parameter in llm.parameters()):
        logger.warning_once(
            f"{_class_name(unproven[0].attention)}: no test of LayAlign has seen it, and its weights are not at hand to try whether cross "
            "states become keys and values as its own hidden states do; load it whole once"
        )
        return
    check(llm, unproven)


def bring_arguments(llm: Any, modules: Sequence[Any]) -> list[Any]:
    """For attention modules whose decoder layer keeps LayAlign's argument `fusion` to itself: hooks that bring it there.

    It travels in the attention mask, which every layer hands on, also where a checkpointed one is computed again.

    Args:
        llm: the LLM they are in.
        modules: the attention modules.

    Returns:
        the handles of the hooks, which `remove()` takes off.
    """
    handles: list[Any] = []
    parents = {id(child): parent for parent in llm.modules() for child in parent.children()}
    for attention in modules:
        if not layout_of(attention).passes_arguments:
            handles.append(parents[id(attention)].register_forward_pre_hook(_put_in, with_kwargs=True))
            handles.append(attention.register_forward_pre_hook(_take_out, with_kwargs=True))
    return handles


def _put_in(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = kwargs.get("attention_mask")
    if "fusion" in kwargs and isinstance(mask, FusionMask):
        kwargs = kwargs | {"attention_mask": mask._replace(states=kwargs["fusion"])}
    return args, kwargs


def _take_out(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    states = getattr(kwargs.get("attention_mask"), "states", None)
    return args, kwargs if states is None else kwargs | {"fusion": states}


@torch.no_grad()
def check(llm: Any, projections: Sequence[KeyValueProjection] | None = None) -> None:
    """See that cross states become keys and values as the LLM's own attention makes them of hidden states, by trying it.

    Random hidden states are put before every attention module, without RoPE, and what arrives at the attention function is
    compared with what its layout says. Costs two passes over three rows of one token.

    Args:
        llm: a transformers causal LM; it is left as it was.
        projections: of some of its layers; None: of all.

    Raises:
        ValueError: an LLM that makes them otherwise, or that LayAlign cannot read at all.
    """
    from layalign.probing import made_by
    from layalign.projections import key_value_projections

    if projections is None:
        projections = key_value_projections(llm)
    width, weight = llm.config.get_text_config(decoder=True).hidden_size, llm.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    streams = torch.randn(2, len(projections), 3, width, generator=generator).to(weight.device, llm.dtype)
    made = made_by(llm, [projection.attention for projection in projections], streams)
    for i, projection in enumerate(projections):
        place = made[i][0].device
        found = projection.split(*projection(streams[0, i][None].to(place), streams[1, i][None].to(place)))
        # Quantised layers round what they read by what stands beside it.
        most = 1e-4 if projection.is_plain and llm.dtype == torch.float32 else 0.1
        for what, own, (ours,) in zip(("keys", "values"), made[i], found, strict=True):
            if own.shape != ours.shape or not (own - ours).abs().max() <= most * own.abs().max():
                raise ValueError(
                    f"{_class_name(projection.attention)}: LayAlign would make other {what} of cross states than this LLM makes of "
                    "hidden states (a norm, a factor or an order of heads that it does not know of); `layalign.families.register` "
                    "tells it how they are made"
                )
