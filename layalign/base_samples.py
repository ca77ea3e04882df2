"""What a base is known by: a few of its weights, kept with the model, so that another base of equal size is not taken for it.

A hash of all would take minutes with every LLM. These are 64 values of 16 tensors spread over the base: another base, or one
trained further as a whole, differs in them. What they do not see is a change of a few weights elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

TENSORS, VALUES = 16, 4
Sample = dict[str, str]


def sample(base: nn.Module) -> Sample:
    """{name: "dtype numel values"} of some of a base's matrices, the values in hexadecimal; empty where none is at hand as it is:
    quantised, sharded and offloaded ones are not.

    Args:
        base: an encoder or an LLM; gates and LoRA on it are not its own.
    """
    found = {
        name.replace(".base_layer", ""): own.detach()
        for name, own in base.named_parameters()
        if ".fusion_gate." not in name and ".lora_" not in name and _at_hand(own)
    }
    names = sorted(found)
    chosen = [names[index * len(names) // TENSORS] for index in range(min(TENSORS, len(names)))] if names else []
    return {name: _written(found[name]) for name in dict.fromkeys(chosen) if not is_unused(name)}


def is_unused(name: str) -> bool:
    """Whether a base's weight is of its pooler, which LayAlign does not use; where a checkpoint lacks it, it is drawn anew at each load."""
    return "pooler" in name


def differing(kept: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Names of tensors that two samples have in common and of other values. Those of two dtypes may differ by rounding.

    Raises:
        ValueError: no samples.
    """
    return [name for name, own in kept.items() if name in found and not _same(own, found[name])]


def check_same(role: str, shown: object, kept: Mapping[str, Any] | None, found: Mapping[str, Any] | None) -> None:
    """Compare a base with the one that a model was trained with.

    Args:
        role: "encoder" or "llm".
        shown: what it was loaded from, for messages.
        kept, found: {role: sample} of the model and of the base; without one nothing is compared.

    Raises:
        ValueError: they have other weights.
    """
    known, own = (kept or {}).get(role) or {}, (found or {}).get(role) or {}
    if other := differing(known, own):
        raise ValueError(
            f"{role} {str(shown)!r} is not the one trained with: of {len(known.keys() & own.keys())} tensors compared, {len(other)} "
            f"hold other values ({other[0]}); give the base that it was trained with (from_pretrained's check_bases=False skips this)"
        )


def check_finite(role: str, shown: object, base: nn.Module) -> None:
    """Look at every weight of a base that is at hand as it is. In bf16 this takes 0.11 s a GB on one core; `isfinite` takes 4.2 s.

    Args:
        role: "encoder" or "llm".
        shown: what it was loaded from, for messages.
        base: as loaded.

    Raises:
        ValueError: a weight that is NaN or Inf.
    """
    for name, own in base.named_parameters():
        # NaN goes through to both ends, Inf is one of them.
        if _is_plain(own) and not all(end.isfinite() for end in torch.aminmax(own.detach())):
            raise ValueError(
                f"{role} {str(shown)!r}: {name} holds NaN or Inf as {str(own.dtype).removeprefix('torch.')}; its weights are damaged "
                "or too large for that dtype: fetch or save them again, or choose another (from_pretrained's check_bases=False skips this)"
            )


def _at_hand(own: nn.Parameter) -> bool:
    return _is_plain(own) and own.dim() > 1


def _is_plain(own: nn.Parameter) -> bool:
    plain = type(own) is nn.Parameter and type(own.data) is torch.Tensor and own.device.type != "meta"
    return plain and own.is_floating_point() and own.itemsize > 1 and own.numel() > 0


def _written(own: torch.Tensor) -> str:
    places = [index * (own.numel() - 1) // (VALUES - 1) for index in range(VALUES)]
    values = own.reshape(-1)[torch.tensor(places, device=own.device)].to("cpu", torch.float64)
    return " ".join(
        [str(own.dtype).removeprefix("torch."), str(own.numel()), *(value.hex() for value in values.tolist())]
    )


def _read(written: Any) -> tuple[torch.dtype, int, torch.Tensor]:
    try:
        dtype, numel, *values = written.split()
        found = getattr(torch, dtype), int(numel), torch.tensor([float.fromhex(x) for x in values], dtype=torch.float64)
        assert isinstance(found[0], torch.dtype) and len(values) == VALUES
    except (AttributeError, ValueError, AssertionError) as error:
        raise ValueError(f"base_samples: {written!r} is not what LayAlign writes there") from error
    return found


def _same(left: Any, right: Any) -> bool:
    if left == right:
        return True
    (dtype, numel, values), (other_dtype, other_numel, others) = _read(left), _read(right)
    if numel != other_numel:
        return False
    # A value that is rounded twice is off by less than this; the least that fp16 tells from 0 is 6e-8.
    close = 2 * max(torch.finfo(dtype).eps, torch.finfo(other_dtype).eps) if dtype != other_dtype else 0.0
    return torch.allclose(values, others, rtol=close, atol=1e-7 if close else 0.0, equal_nan=True)
