"""What a training step takes: memory by part and arithmetic, from the sizes of the models alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from layalign.configuration import encoder_depth
from layalign.label_loss import CPU_LOGITS, LOGITS
from layalign.parts import part_of, trained_parameters
from layalign.projections import attention_modules, key_value_projection

if TYPE_CHECKING:
    from layalign.model import LayAlignForConditionalGeneration

_FP32 = 4
# Bytes a weight: bitsandbytes has an fp32 scale for each 64 weights of 4 bits, for a row of 8.
_QUANTIZED = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}
# Of weights, gradients and optimizer, so many are shared out by an engine: the last first.
_SHARED = {"fsdp2": 3, "zero3": 3, "zero2": 2}
# What PyTorch and its libraries take on a GPU beside tensors: context, workspaces, fragments. A round figure.
GPU_OVERHEAD = 10**9


@dataclass(frozen=True)
class Batch:
    """The shape of one forward call.

    Attributes:
        rows: examples; in token budgets a mean, which need not be whole.
        source: tokens of the encoder in a row, padding included.
        text: tokens of the LLM in a row, prompt and target.
        target: those of the target.
    """

    rows: float
    source: float
    text: float
    target: float


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, read off its modules (which may be on the meta device).

    Attributes:
        encoder, llm: parameters.
        encoder_layers, llm_layers: parameters without embeddings and head.
        adapter, aligner, gates, lora: parameters that are trained beside frozen bases.
        encoder_size, llm_size, vocabulary, inner: De, Dl, V, width of the LLM's MLP.
        states, depth, encoder_depth: E, L, layers of the encoder.
        aligner_width: of the aligner's further layer; 0: it has none.
        encoder_trained: parameters of the encoder that are trained.
        query, key: heads times head size, of queries and of keys (or values).
        heads: of queries.
        encoder_query: of the encoder's attention.
        encoder_bytes, llm_bytes: of one parameter.
    """

    encoder: int
    llm: int
    encoder_layers: int
    llm_layers: int
    adapter: int
    aligner: int
    gates: int
    lora: int
    encoder_size: int
    llm_size: int
    vocabulary: int
    inner: int
    states: int
    depth: int
    encoder_depth: int
    query: int
    key: int
    heads: int
    encoder_query: int
    encoder_bytes: int
    llm_bytes: int
    aligner_width: int = 0
    encoder_trained: int = 0

    @property
    def trained(self) -> int:
        """Parameters that are trained where the bases are frozen."""
        return self.adapter + self.aligner + self.gates + self.lora

    def of(self, parts: Sequence[str]) -> int:
        """Parameters of some of the parts: "adapter", "aligner", "gates", "lora", "llm", "encoder"."""
        return sum(self.encoder_trained if part == "encoder" else getattr(self, part) for part in parts)


def sizes_of(model: LayAlignForConditionalGeneration) -> Sizes:
    """Read a model's sizes; it may be on the meta device."""
    config, encoder, llm = model.config, model.encoder, model.llm
    text, first = config.get_text_config(), next(iter(attention_modules(llm).values()))
    projection = key_value_projection(first, text)
    head = llm.get_output_embeddings().weight
    embeddings = {id(head): head, id(llm.get_input_embeddings().weight): llm.get_input_embeddings().weight}
    counts = Counter({name: value.numel() for name, value in model.named_parameters()})
    gates, lora = (sum(n for name, n in counts.items() if part_of(name) == part) for part in ("gates", "lora"))
    of_llm, of_encoder = _count(llm) - gates - lora, 0 if encoder is None else _count(encoder)
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    encoder_size = getattr(config.encoder_config, "hidden_size", 0)
    encoder_heads = getattr(config.encoder_config, "num_attention_heads", 1)
    return Sizes(
        encoder=of_encoder,
        llm=of_llm,
        encoder_layers=0 if encoder is None else of_encoder - encoder.get_input_embeddings().weight.numel(),
        llm_layers=of_llm - sum(value.numel() for value in embeddings.values()),
        adapter=0 if model.adapter is None else _count(model.adapter),
        aligner=0 if model.aligner is None else _count(model.aligner),
        gates=gates,
        lora=lora,
        encoder_size=encoder_size,
        llm_size=text.hidden_size,
        vocabulary=head.shape[0],
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        states=0 if model.aligner is None else len(config.mixed_states),
        depth=text.num_hidden_layers,
        encoder_depth=0 if encoder is None else encoder_depth(config.encoder_config),
        query=text.num_attention_heads * head_size,
        key=projection.heads * projection.head_dim,
        heads=text.num_attention_heads,
        encoder_query=encoder_heads * (getattr(config.encoder_config, "d_kv", None) or encoder_size // encoder_heads),
        encoder_bytes=0 if encoder is None else encoder.dtype.itemsize,
        llm_bytes=llm.dtype.itemsize,
        aligner_width=(config.aligner_width or 0) if model.aligner is not None else 0,
        encoder_trained=sum(own.numel() for name, own in trained_parameters(model) if part_of(name) == "encoder"),
    )


def positions(batch: Batch, sizes: Sizes) -> float:
    """Positions of the LLM in one row: [bos][soft prompts][boundary][text]."""
    return 1 + (batch.source + 1 if sizes.adapter else 0) + batch.text


def memory(
    sizes: Sizes,
    batch: Batch,
    autocast: bool,
    checkpointing: bool,
    on_cpu: bool,
    trained: Sequence[str] = ("adapter", "aligner", "gates"),
    quantization: Mapping[str, Any] | None = None,
    engine: str = "none",
) -> dict[str, int]:
    """Bytes of one process by part, at the end of a forward call, where the most is held.

    Args:
        sizes: of the model.
        batch: its longest.
        autocast: whether it runs in bf16 autocast.
        checkpointing: whether each LLM layer is computed again in the backward pass.
        on_cpu: where logits are computed in smaller parts than on a GPU.
        trained: parts that are.
        quantization: of the bases, as a recipe has it.
        engine: as for `sharded`.
    """
    llm_bytes = _FP32 if "llm" in trained else sizes.llm_bytes
    wide = 2 if autocast else llm_bytes
    sources, rows = batch.rows * batch.source, batch.rows * positions(batch, sizes)
    # Frozen linear layers keep no inputs; kept are: both norms in fp32, queries, keys, values, both outputs of the attention with
    # their log-sum-exps, and the gated MLP's three products.
    layer = 2 * _FP32 * sizes.llm_size + wide * (3 * sizes.query + 2 * sizes.key + 3 * sizes.inner) + 8 * sizes.heads
    layers = (sizes.depth * wide * sizes.llm_size + layer) if checkpointing else sizes.depth * layer
    fused = 0.0
    if sizes.states:
        fused = sources * (sizes.states * sizes.encoder_size * sizes.encoder_bytes + 2 * sizes.depth * sizes.key * wide)
    if sizes.states and sizes.aligner_width:  # its streams are made, and kept before and after the further layer
        kept = sizes.encoder_size + 2 * sizes.aligner_width + sizes.llm_size
        fused += 2 * sizes.depth * sources * kept * wide
    adapted = sources * (sizes.encoder_size * 3 + sizes.llm_size) * (2 if autocast else _FP32) if sizes.adapter else 0
    # Weights that are no bf16 are cast by autocast in each layer, and the copies kept: what is checkpointed keeps one layer's, but
    # those of trained weights autocast itself keeps to its end, where they are not gathered anew for each layer.
    cast = 2 * sizes.llm_layers if autocast and llm_bytes == _FP32 else 0
    if checkpointing and ("llm" not in trained or _SHARED.get(engine) == 3):
        cast //= sizes.depth
    # Logits, the same in fp32, their log-softmax, and its gradient.
    at_once = min(batch.rows * batch.target * sizes.vocabulary, max(CPU_LOGITS if on_cpu else LOGITS, sizes.vocabulary))
    logits = at_once * (3 * _FP32 + (wide if wide != _FP32 else 0))
    # Layers of a trained LLM keep their inputs for the gradients of their weights: norms in fp32, linear ones each its cast.
    if "llm" in trained:
        kept = sizes.depth if not checkpointing else 1
        inputs = (5 if autocast else 2) * sizes.llm_size + sizes.query + sizes.inner
        layers += kept * (2 * _FP32 * sizes.llm_size + wide * inputs)
    encoder_bytes = _FP32 if "encoder" in trained else sizes.encoder_bytes
    weights = _base_bytes("encoder", sizes.encoder, sizes.encoder_layers, encoder_bytes, quantization)
    weights += _base_bytes("llm", sizes.llm, sizes.llm_layers, llm_bytes, quantization)
    return {
        "weights": int(weights) + sizes.trained * _FP32,
        "gradients": sizes.of(trained) * _FP32,
        "optimizer": 2 * sizes.of(trained) * _FP32,
        "activations": int(rows * layers + fused + adapted + cast),
        "logits": int(logits),
    }


def sharded(
    parts: dict[str, int],
    sizes: Sizes,
    engine: str,
    processes: int,
    trained: Sequence[str] = ("adapter", "aligner", "gates"),
) -> dict[str, int]:
    """The memory of one process of several that share what they hold.

    Args:
        parts: of `memory`.
        sizes: of the model.
        engine: "fsdp2" or "zero3" shard weights, gradients and optimizer, "zero2" the latter two; any other shards nothing, and "ddp"
            has a second copy of the gradients, in the buckets that processes exchange.
        processes: that train together.
        trained: parts that are.

    Returns:
        the same parts, and "gathered": the weights that are whole at a time, two layers and what belongs to no layer.
    """
    shared = _SHARED.get(engine, 0)
    names = ("optimizer", "gradients", "weights")[:shared]
    parts = {name: math.ceil(size / processes) if name in names else size for name, size in parts.items()}
    if engine == "ddp" and processes > 1:
        parts["gradients"] *= 2
    if shared == 3:
        llm = 2 * sizes.llm_layers // sizes.depth + sizes.llm - sizes.llm_layers
        encoder = sizes.encoder - sizes.encoder_layers
        parts["gathered"] = llm * (_FP32 if "llm" in trained else sizes.llm_bytes) + encoder * sizes.encoder_bytes
    return parts


def _base_bytes(role: str, count: int, layers: int, width: int, quantization: Mapping[str, Any] | None) -> float:
    """Bytes of a base's weights; what is in no layer is not quantised."""
    bits = (quantization or {}).get(role, {}).get("bits")
    return count * width if bits is None else (count - layers) * width + layers * _QUANTIZED[bits]


def arithmetic(sizes: Sizes, batch: Batch, checkpointing: bool, trained: Sequence[str] = ()) -> float:
    """Floating-point operations of one forward and backward call.

    An encoder that is not trained runs forward only; frozen layers of the LLM need no gradient of their weights.

    Args:
        sizes: of the model.
        batch: a mean one.
        checkpointing: whether each LLM layer is computed again in the backward pass.
        trained: parts that are; of the LLM, it takes the gradients of its weights.
    """
    length = positions(batch, sizes)
    sources, places = batch.rows * batch.source, batch.rows * length
    encoder = (
        2 * sizes.encoder_layers * sources + 4 * batch.source * sources * sizes.encoder_query * sizes.encoder_depth
    )
    if "encoder" in trained:  # backward through all its layers, for their weights too where these are trained
        encoder *= 3 if sizes.encoder_trained == sizes.encoder else 2
    cross = batch.source if sizes.states else 0
    attention = 2 * places * sizes.query * sizes.depth * (length + 2 * cross)
    forward = 2 * sizes.llm_layers * places + attention
    llm = forward * (3 if checkpointing else 2) + attention
    llm += 2 * places * (sizes.llm_layers if "llm" in trained else 0) + 6 * places * sizes.lora
    head = 2 * (3 if "llm" in trained else 2) * batch.rows * batch.target * sizes.llm_size * sizes.vocabulary
    adapter = 5 * sizes.adapter * sources
    aligner = 0.0
    if sizes.states:
        streams = 2 * sizes.depth * sources
        # The mix and the shared projection, forward, again, and twice backward; each layer's own keys or values, forward and back.
        aligner = streams * (
            6 * sizes.states * sizes.encoder_size
            + 8 * (sizes.aligner_width or sizes.encoder_size) * sizes.llm_size
            + 6 * sizes.encoder_size * sizes.aligner_width
            + 4 * sizes.llm_size * sizes.key
        )
    return float(encoder + llm + head + adapter + aligner)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
