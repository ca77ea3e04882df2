"""Weights that accelerate's hooks keep on the CPU or on disk, and bring for a module's call: at hand outside of such a call too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def hooks(module: torch.nn.Module) -> Sequence[Any]:
    """accelerate's hooks on a module itself."""
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", () if hook is None else (hook,))


def at_hand(module: Any, name: str) -> Any:
    """A parameter of a module (None: it has none), brought to where it computes if it is offloaded.

    Args:
        module: whose own it is.
        name: of the parameter.
    """
    value, hook = getattr(module, name), getattr(module, "_hf_hook", None)
    if value is None or hook is None or value.device.type != "meta":
        return value
    hook.pre_forward(module)
    value = getattr(module, name)
    hook.post_forward(module, None)  # the module lets go of it; this reference keeps it
    return value


def is_offloaded(module: torch.nn.Module) -> bool:
    """Whether accelerate keeps weights of it elsewhere between calls, so that they can be neither trained nor changed."""
    return any(getattr(hook, "offload", False) for part in module.modules() for hook in hooks(part))


def working_device(module: torch.nn.Module, otherwise: torch.device) -> torch.device:
    """Where a module computes: its weights' device, or, where accelerate's hooks bring them, the hooks'; `otherwise` without any."""
    if (device := _brought_to(module)) is not None:
        return device
    weight = next(module.parameters(), None)
    return otherwise if weight is None else weight.device


def execution_device(model: torch.nn.Module) -> torch.device | None:
    """Where an offloaded model's hooks bring its weights, as the first of them says; None: there are no such hooks."""
    return next((device for module in model.modules() if (device := _brought_to(module)) is not None), None)


def _brought_to(module: torch.nn.Module) -> torch.device | None:
    places = (getattr(hook, "execution_device", None) for hook in hooks(module))
    return next((torch.device(place) for place in places if place is not None), None)
