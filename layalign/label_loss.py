"""The cross-entropy of label positions without all their logits at once: over a vocabulary of 250,000 these outweigh all else."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from layalign.kernels.dispatch import autocast_dtype, first_gradients_only
from layalign.shards import is_partition

# Logits that exist at a time. On a CPU (Dl 576, vocabulary 32,000, 2,048 labels, fp32, one busy core), forward and backward against all
# at once: 0.92 of the time at 2^22, 0.94 at 2^24, 1.6 at 2^20; the process takes 697 MB at 2^24, 1,252 MB with all. GPUs were not measured.
CPU_LOGITS, LOGITS = 2**24, 2**27


class OutputLayer(NamedTuple):
    """From hidden states to logits: softcap * tanh(scale * module(hidden) / softcap).

    Attributes:
        module: the LLM's output embeddings.
        scale: of Cohere and Granite, else 1.
        softcap: of Gemma 2, else None.
    """

    module: nn.Module
    scale: float
    softcap: float | None

    def logits(self, hidden: torch.Tensor, hooked: bool = False) -> torch.Tensor:
        """hidden (..., Dl) -> (..., V).

        Args:
            hidden: of the LLM's last layer.
            hooked: whether the module's hooks gather its shards. Not within a call of the module, which has done it: a backward
                pass through the hooks would end the step for FSDP2 in its midst.
        """
        logits = self.module(hidden) if hooked else self.module.forward(hidden)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy of hidden (N, Dl) against targets (N,), -100 ignored, all logits at once."""
        return summed(self.logits(hidden), targets)


class LabelLoss:
    """Runs an LLM for the loss of its labels. Knows, after the first time, whether its logits are what `OutputLayer` takes them to be;
    where they are not, the LLM makes them itself, all at once.
    """

    def __init__(self) -> None:
        self._exact: bool | None = None

    def run(
        self, llm: PreTrainedModel, arguments: Mapping[str, Any], targets: torch.Tensor, columns: torch.Tensor
    ) -> tuple[Any, torch.Tensor]:
        """-> the LLM's output, in which logits are left out or of no use, and the summed loss.

        Args:
            llm: the LLM.
            arguments: of its forward call, without logits_to_keep.
            targets: (B, C) long, -100 where no loss.
            columns: (C,) long, the positions that predict them.
        """
        if (
            not targets.numel()
        ):  # a position without a label, so that what is gathered of a sharded LLM is gathered by all
            columns, targets = columns.new_zeros(1), targets.new_full((len(targets), 1), -100)
        head = llm.get_output_embeddings()
        if self._exact is False or head is None or _is_compiled(llm):
            out = llm(**arguments, logits_to_keep=columns)
            return out, summed(out.logits.flatten(0, 1), targets.flatten())
        layer = output_layer(llm)
        made: list[torch.Tensor] = []

        def take_hidden(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            # Within the LLM's own forward: shards are gathered there, and what it does before the layer is done. The layer has a call
            # of its own to come, so it gets one state, whose strides torch takes for a matrix: see `kept_columns`.
            hook.remove()
            hidden, *more = inputs
            if hidden.shape[1] != targets.shape[1]:
                hidden = hidden.index_select(1, columns)
            made.extend((label_loss(layer, hidden.flatten(0, 1), targets.flatten()), hidden[0, :1][None]))
            return (made[1], *more)

        hook = head.register_forward_pre_hook(take_hidden)
        try:
            out = llm(**arguments, logits_to_keep=columns)
        finally:
            hook.remove()
        if not made:
            self._exact = False
            return out, summed(out.logits.flatten(0, 1), targets.flatten())
        total, hidden = made
        if self._exact is None:
            with torch.no_grad():
                expected, found = out.logits.float(), layer.logits(hidden, hooked=True).float()
                self._exact = bool((expected - found).norm() <= 1e-3 * expected.norm())
            if not self._exact:
                return self.run(llm, arguments, targets, columns)
        return out, total


def _is_compiled(llm):
    """Whether a hook would break a graph, or have one made at each step."""
    return torch.compiler.is_compiling() or hasattr(llm, "_orig_mod") or llm._compiled_call_impl is not None


def output_layer(llm: PreTrainedModel) -> OutputLayer:
    """The output layer of an LLM as its configuration tells it."""
    config = llm.config.get_text_config(decoder=True)
    softcap = getattr(config, "final_logit_softcapping", None)
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    factor = float(scale) if isinstance(scale, (int, float)) else 1.0
    factor /= float(divisor) if isinstance(divisor, (int, float)) and divisor else 1.0
    return OutputLayer(llm.get_output_embeddings(), factor, softcap or None)


def summed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of logits (N, V) against targets (N,), -100 ignored, in fp32 or, of fp64, in that."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def label_loss(layer: OutputLayer, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy, the logits made in parts: a frozen layer's gradient is taken with each part, a trained one makes them
    once more in the backward pass. On a GPU by Liger's kernel where that is installed and the layer is plain.

    Args:
        layer: from hidden states to logits.
        hidden: (N, Dl).
        targets: (N,) long, -100 where no loss.
    """
    if hidden.device.type == "cpu":  # looking is free, and a padded batch has rows that have ended
        real = targets != -100
        if not bool(real.all()):
            hidden, targets = hidden[real], targets[real]
    if takes_liger(layer, hidden):
        return _by_liger(layer, _first_gradients_only(hidden), targets)
    weight: Any = layer.module.weight
    vocabulary = getattr(layer.module, "out_features", None) or weight.shape[0]
    rows = max((CPU_LOGITS if hidden.device.type == "cpu" else LOGITS) // int(vocabulary), 1)
    # ZeRO-3 would gather a frozen weight once more in the backward pass, which no process may do alone for the number of its labels.
    if len(hidden) <= rows and not is_partition(weight):
        return layer.loss(hidden, targets)
    parts = list(zip(hidden.split(rows), targets.split(rows), strict=True))
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in layer.module.parameters()):
        losses = [checkpoint(layer.loss, *part, use_reentrant=False) for part in parts]
    elif torch.is_grad_enabled() and hidden.requires_grad:
        return _Frozen.apply(_first_gradients_only(hidden), targets, layer, rows)
    else:
        losses = [layer.loss(*part) for part in parts]
    return torch.stack(losses).sum()


class _Frozen(torch.autograd.Function):
    """Loss and gradient in one go: what is kept for the backward pass is as large as the hidden states."""

    @staticmethod
    def forward(ctx, hidden, targets, layer, rows):
        gradient, losses = torch.empty_like(hidden), []
        for part, wanted, into in zip(hidden.split(rows), targets.split(rows), gradient.split(rows), strict=True):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                loss = layer.loss(part, wanted)
            into.copy_(torch.autograd.grad(loss, part)[0])
            losses.append(loss.detach())
        ctx.save_for_backward(gradient)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None


class _LabelLoss(torch.autograd.Function):
    """Hidden states as they are, into a loss that has first gradients only. `origin` is a tensor of their graph."""

    @staticmethod
    def forward(ctx, hidden, origin):
        ctx.save_for_backward(origin)
        return hidden.view_as(hidden)

    @staticmethod
    @partial(
        first_gradients_only,
        instead="the loss made in parts has first ones only; skip_logits=False makes it of all logits at once, which has both",
    )
    def backward(ctx, grad):
        return grad, None


def _first_gradients_only(hidden: torch.Tensor) -> torch.Tensor:
    # An empty origin: saving the hidden states themselves would keep their memory.
    return _LabelLoss.apply(hidden, hidden[:0].clone()) if hidden.requires_grad else hidden


def takes_liger(layer: OutputLayer, hidden: torch.Tensor) -> bool:
    """Whether Liger's fused linear cross-entropy is installed and may make this loss: a plain linear layer on a GPU, in one dtype."""
    module = layer.module
    if hidden.device.type != "cuda" or type(module) is not nn.Linear or find_spec("liger_kernel") is None:
        return False
    plain = type(module.weight) is nn.Parameter and not (module._forward_hooks or module._forward_pre_hooks)
    return plain and module.weight.dtype == (autocast_dtype(hidden) or hidden.dtype)


def _by_liger(layer, hidden, targets):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    module = layer.module
    with torch.autocast(hidden.device.type, enabled=False):
        return liger_fused_linear_cross_entropy(
            hidden.to(module.weight.dtype) * layer.scale if layer.scale != 1 else hidden.to(module.weight.dtype),
            module.weight,
            targets,
            bias=None if module.bias is None else module.bias * layer.scale,
            ignore_index=-100,
            reduction="sum",
            softcap=layer.softcap,
        )
