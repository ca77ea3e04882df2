"""The bare LLM with the kernels of the package liger-kernel."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel

from bench.measuring import Missing
from bench.model_systems import BareLLM, Trained

if TYPE_CHECKING:
    from bench.model_suite import Compared


class LigerLLM(BareLLM):
    """With the kernels of the package liger-kernel in place of norms, MLPs' activations and the loss."""

    def __init__(self, encoder: PreTrainedModel, llm: PreTrainedModel, batch: dict[str, Tensor], trained: Trained):
        super().__init__(encoder, llm, batch, trained)
        from liger_kernel.transformers.functional import liger_rms_norm, liger_swiglu

        def norm(module):
            return lambda states: liger_rms_norm(states, module.weight, module.variance_epsilon)

        def swiglu(module):
            return lambda states: module.down_proj(liger_swiglu(module.gate_proj(states), module.up_proj(states)))

        llm.model.norm.forward = norm(llm.model.norm)
        for layer in llm.model.layers:
            layer.mlp.forward = swiglu(layer.mlp)
            for module in (layer.input_layernorm, layer.post_attention_layernorm):
                module.forward = norm(module)

    def head_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden (N, Dl), targets (N,)."""
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(hidden, self.llm.lm_head.weight, targets)


def liger(compared: Compared) -> LigerLLM | Missing:
    """Missing too where it computes something else than the bare LLM."""
    if importlib.util.find_spec("liger_kernel") is None:
        return Missing("liger-kernel is not installed")
    if compared.llm.device.type != "cuda":
        return Missing("liger-kernel needs a GPU")
    return compared.as_bare(LigerLLM)


PEERS = {"model": {"bare + liger": liger}}
