"""The bare LLM with the kernels of the package liger-kernel."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel

from bench.attempts import in_a_line
from bench.measuring import Missing
from bench.model_systems import BareLLM, Trained

if TYPE_CHECKING:
    from bench.model_suite import Compared

FUNCTIONAL = "liger_kernel.transformers.functional"


class LigerLLM(BareLLM):
    """With the kernels of the package liger-kernel in place of norms, MLPs' activations and the loss."""

    def __init__(self, encoder: PreTrainedModel, llm: PreTrainedModel, batch: dict[str, Tensor], trained: Trained):
        super().__init__(encoder, llm, batch, trained)
        functional = import_module(FUNCTIONAL)

        def norm(module):
            return lambda states: functional.liger_rms_norm(states, module.weight, module.variance_epsilon)

        def swiglu(module):
            return lambda states: module.down_proj(
                functional.liger_swiglu(module.gate_proj(states), module.up_proj(states))
            )

        llm.model.norm.forward = norm(llm.model.norm)
        for layer in llm.model.layers:
            layer.mlp.forward = swiglu(layer.mlp)
            for module in (layer.input_layernorm, layer.post_attention_layernorm):
                module.forward = norm(module)

    def head_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden (N, Dl), targets (N,)."""
        return import_module(FUNCTIONAL).liger_fused_linear_cross_entropy(hidden, self.llm.lm_head.weight, targets)


def liger(compared: Compared) -> LigerLLM | Missing:
    """Missing too where it computes something else than the bare LLM."""
    if find_spec("liger_kernel") is None:
        return Missing("liger-kernel is not installed")
    if compared.llm.device.type != "cuda":
        return Missing("liger-kernel needs a GPU")
    try:
        import_module(FUNCTIONAL)
    except Exception as error:  # made for another Triton or transformers: that costs no other row
        return Missing(f"liger-kernel does not import: {in_a_line(error)}")
    return compared.as_bare(LigerLLM)


PEERS = {"model": {"bare + liger": liger}}
