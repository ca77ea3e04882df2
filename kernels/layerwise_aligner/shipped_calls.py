"""The calls of the layer-wise aligner whose kernels the compile report compiles, on meta tensors."""

from __future__ import annotations

from typing import Any

import torch

from .call import Call
from .gpu import operator
from .gpu.matmul import matmul, summed_matmul
from .gpu.mix import mix, mix_gradients
from .key_values import backward, forward, plan

VARIANTS = ("folded", "unfolded", "streams", "deep", "odd")
BY_HEAD_DIM = False  # the kernels do not differ by it


def lengths(variant: str, **of_launch_table: Any) -> tuple[int, ...]:
    """Encoder tokens: of a training batch, and of one question, where tiles of fewer rows serve."""
    return {"odd": (1999,), "deep": (2048,)}.get(variant, (2048, 48))


def run(variant: str, head_dim: int, dtype: torch.dtype, length: int) -> None:
    """Forward and backward with every gradient: 24 encoder states, 32 LLM layers of 32 query and 8 key heads.

    folded, unfolded: keys and values of all layers, with biases, by either way through the projection.
    streams: mix and grouped linear layers on their own, the weight shared and one for each stream, unfolded.
    deep: mixes of more encoder states, 48 and 96, and into more streams, 160, than a tile holds.
    odd: the first two with widths whose rows start anywhere.
    """
    layers, odd = 32, variant == "odd"
    encoder_width, llm_width, kv_width = 2048 - odd, 32 * head_dim - odd, 8 * head_dim - odd

    def empty(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    def mixed(states, streams):
        """Arguments and result of a mix, after those of its gradients that training and a call for all ask for."""
        arguments = [empty(length, encoder_width) for _ in range(states)], empty(streams, states), empty(streams)
        out = mix(*arguments)
        for wanted in ((True, True, True), (False, True, True), (True, False, False)):
            mix_gradients(out, *arguments, *wanted, dtype)
        return *arguments, out

    if variant == "deep":
        for sizes in ((48, 64), (96, 64), (24, 160)):
            mixed(*sizes)
        return
    states, weight, bias = [empty(length, encoder_width) for _ in range(24)], empty(2 * layers, 24), empty(2 * layers)
    if variant == "streams":
        *_, streams = mixed(24, 2 * layers)
        for width in ((kv_width, encoder_width), (2 * layers, kv_width, encoder_width)):
            _stream_linear(streams, empty(*width), empty(*width[:-1]))
        return
    weights, biases = ([empty(*shape) for _ in range(layers)] for shape in ((kv_width, llm_width), (kv_width,)))
    projection = empty(llm_width, encoder_width), empty(llm_width)
    call = Call([state[None] for state in states], weight, bias, *projection, weights, weights, biases, biases)
    for folded in (True, False) if odd else (variant == "folded",):
        way = plan(call, folded, None)
        out = forward(operator.PRODUCTS, call, way)
        backward(operator.PRODUCTS, out, call, way, Call(*(True,) * 9))


def _stream_linear(streams, weight, bias):
    """The products of `stream_linear` and its gradients."""
    out = matmul(streams, weight, bias, transpose_b=True)
    matmul(out, weight)
    if weight.dim() == 2:
        summed_matmul(out, streams, torch.empty_like(weight, dtype=torch.float32))
    else:
        matmul(out, streams, transpose_a=True)


def run_sizes(
    *,
    head_dim: int,
    dtype: torch.dtype,
    tokens: int,
    states: int,
    width: int,
    streams: int,
    columns: int,
    product: str | None,
) -> None:
    """Mix of `states` encoder states and its gradients, or one product of what it gives, (streams, tokens, width), with weights
    of `columns` rows: "shared", "strided" (a weight for each stream) or "listed" (in tensors of their own)."""

    def empty(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    if product is None:
        weight, bias, inputs = empty(streams, states), empty(streams), [empty(tokens, width) for _ in range(states)]
        mixed = mix(inputs, weight, bias)
        mix_gradients(mixed, inputs, weight, bias, True, True, True)
        return
    weights = {
        "shared": lambda: empty(columns, width),
        "strided": lambda: empty(streams, columns, width),
        "listed": lambda: [empty(columns, width) for _ in range(streams)],
    }
    matmul(empty(streams, tokens, width), weights[product](), transpose_b=True)
