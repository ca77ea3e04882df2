"""Packed batches: sequences end to end in one row, for the encoder and for the LLM, without a position of padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from layalign import limits, sequence, shards
from layalign.fusion import NAME, CrossInputs, CrossStates, Packing, swap_attention
from layalign.offloading import at_hand
from layalign.sequence import Lengths

if TYPE_CHECKING:
    from layalign.model import LayAlignForConditionalGeneration

# What one more call of the encoder costs, in tokens of its work. On a CPU, mT5 of 8 layers and width 512: 27 ms for a call and 0.77 ms
# for each token (one busy core, fp32). Of a GPU nothing was measured: it is to be a multiple of that, for its calls are launches.
CPU_CALL_TOKENS, CALL_TOKENS = 32, 512


class PackedInputs(NamedTuple):
    """What `forward` is given in place of padded rows.

    Attributes:
        encoder_input_ids: (1, T) long, the questions end to end.
        encoder_cu_seqlens: (n + 1,) int32 or int64, where each begins, then T.
        input_ids: (1, M) long, prompts and targets end to end; None: the LLM reads no text.
        cu_seqlens: (n + 1,), where each begins, then M; None without input_ids.
        labels: (1, M) long, -100 where no loss, or None.
    """

    encoder_input_ids: torch.Tensor
    encoder_cu_seqlens: torch.Tensor | None
    input_ids: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    labels: torch.Tensor | None


class PackedEncoded(NamedTuple):
    """`Encoded` of packed questions: soft prompts (1, T, Dl), cross keys and values (1, L, Hkv, T, D); None where there are none."""

    soft: torch.Tensor | None
    keys: torch.Tensor | None
    values: torch.Tensor | None


class PackedAssembled(NamedTuple):
    """What the LLM reads of packed sequences.

    Attributes:
        embeddings: (1, S, Dl), `[bos][soft prompts][boundary][text]` of each sequence end to end.
        position_ids: (1, S) long, from 0 in each.
        cu_seqlens: (n + 1,) int32, where each begins, then S.
        targets: (1, C) long, the labels that have a position before them, None without labels.
        columns: (C,) long, these positions.
    """

    embeddings: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    targets: torch.Tensor | None
    columns: torch.Tensor | None


def check_inputs(model: LayAlignForConditionalGeneration, packed: PackedInputs, lengths: Lengths | None) -> Lengths:
    """The lengths of packed inputs, by one wait for a GPU where they are not given.

    Raises:
        ValueError: bounds or shapes that do not fit, or settings that are about padding.
    """
    if model.config.published_training or not model.config.mask_cross_padding:
        raise ValueError(
            "packed inputs: published_training and mask_cross_padding=False reproduce what padding does in the published code, "
            "and packed rows have none; give padded rows"
        )
    questions, begins, text, text_begins, labels = packed
    if begins is None:
        raise ValueError("encoder_cu_seqlens is missing: cu_seqlens and encoder_cu_seqlens are given together")
    if (text is None) != (text_begins is None):
        what = "input_ids" if text is None else "cu_seqlens"
        raise ValueError(f"{what} is missing: packed input_ids and cu_seqlens are given together")
    rows = {"encoder_input_ids": (questions, begins, "encoder_"), "input_ids": (text, text_begins, "")}
    for name, (ids, bounds, prefix) in rows.items():
        if ids is None or bounds is None:
            continue
        if ids.dim() != 2 or len(ids) != 1:
            raise ValueError(f"{name} with {prefix}cu_seqlens must be one row, (1, tokens), got {tuple(ids.shape)}")
        if bounds.dim() != 1 or bounds.dtype not in (torch.int32, torch.int64) or bounds.shape != begins.shape:
            raise ValueError(
                f"{prefix}cu_seqlens must be (n + 1,) of int32, the same n as of the encoder's ({len(begins) - 1}), "
                f"got {tuple(bounds.shape)} of {bounds.dtype}"
            )
    if labels is not None and (text is None or labels.shape != text.shape):
        got = None if text is None else tuple(text.shape)
        raise ValueError(f"labels must have the shape of input_ids, got {tuple(labels.shape)} for {got}")
    if lengths is None:
        known = [bounds for _, bounds, _ in rows.values() if bounds is not None]
        both = torch.stack([bounds.long() for bounds in known]).tolist()
        lengths = Lengths(*([b - a for a, b in pairwise(ends)] for ends in both))
        starts = [ends[0] for ends in both]
    else:
        starts = [0, 0]
    for (name, (ids, _, prefix)), sizes, start in zip(rows.items(), lengths, starts, strict=False):
        if ids is None:
            continue
        if not sizes or start or min(sizes) < 0 or sum(sizes) != ids.shape[1] or len(sizes) != len(begins) - 1:
            raise ValueError(
                f"{prefix}cu_seqlens must start at 0, never fall and end at {ids.shape[1]}, the tokens of {name}; got sequences of "
                f"{list(sizes or ())} tokens from {start}"
            )
    if model.encoder_limit is not None and max(lengths.encoder) > model.encoder_limit:
        raise ValueError(
            f"encoder_input_ids has {max(lengths.encoder)} tokens in a sequence, the encoder takes {model.encoder_limit}; the "
            f"processor's encoder_max_length={model.encoder_limit} cuts what is longer"
        )
    return lengths


def alike(lengths: Sequence[int], call_tokens: int) -> list[np.ndarray]:
    """Sequences in groups of like length, so that their padded tokens, and `call_tokens` for each group, are the fewest.

    Args:
        lengths: of n sequences; those of length 0 are in no group.
        call_tokens: what a group costs beside its tokens.
    """
    order = np.argsort(lengths, kind="stable")
    order = order[np.asarray(lengths, dtype=np.int64)[order] > 0]
    sizes = np.asarray(lengths, dtype=np.int64)[order]
    # least[j]: of the j shortest, the last group of which begins at first[j].
    least, first = np.zeros(len(order) + 1, dtype=np.int64), np.zeros(len(order) + 1, dtype=np.int64)
    for end in range(1, len(order) + 1):
        costs = least[:end] + (end - np.arange(end)) * sizes[end - 1]
        first[end] = costs.argmin()
        least[end] = costs[first[end]] + call_tokens
    groups, end = [], len(order)
    while end:
        groups.append(order[first[end] : end])
        end = first[end]
    return groups[::-1]


def encoder_states(
    model: LayAlignForConditionalGeneration, ids: torch.Tensor, lengths: Sequence[int], wanted: Sequence[int]
) -> list[torch.Tensor]:
    """Hidden states of the encoder for packed questions, exact for any encoder.

    Encoders take no cu_seqlens: mT5's relative bias, learned positions and XLM-R's, counted from the padding token, need rows of
    their own. So they read padded rows of like length. Of 32 questions of lognormal lengths (sigma 0.8) 10 % of what they read in 7
    calls is padding then, of one padded batch 73 %; a varlen attention for each family could gain no more than that.

    Args:
        model: with the encoder.
        ids: (1, T) long.
        lengths: of each sequence.
        wanted: indices of the states, -1: the last one, as `last_hidden_state` has it.

    Returns:
        one (1, T, De) for each of `wanted`.
    """
    begins = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    filler = getattr(model.encoder.config, "pad_token_id", None) or 0
    states: list[torch.Tensor] = []
    groups = alike(lengths, CPU_CALL_TOKENS if ids.device.type == "cpu" else CALL_TOKENS)
    if shards.is_sharded(model.encoder):
        # Each call gathers the encoder's parameters from all processes, which have other lengths: one each, whatever these are.
        groups = [np.flatnonzero(lengths)]
        if not len(groups[0]):
            model.encoder_states(torch.full((1, 1), filler, dtype=ids.dtype, device=ids.device), None)
            groups = []
    for group in groups:
        sizes = np.asarray(lengths)[group]
        columns = np.arange(sizes.max())
        real = columns < sizes[:, None]
        places = torch.from_numpy((begins[group][:, None] + columns)[real]).to(ids.device)
        mask = torch.from_numpy(real).to(ids.device)
        rows = torch.full(mask.shape, filler, dtype=ids.dtype, device=ids.device)
        rows = rows.masked_scatter(mask, ids[0].index_select(0, places))
        out = model.encoder_states(rows, None if real.all() else mask)
        real_places = None if real.all() else torch.from_numpy(np.flatnonzero(real)).to(ids.device)
        for number, index in enumerate(wanted):
            state = (out.last_hidden_state if index < 0 else out.hidden_states[index]).flatten(0, 1)
            if number == len(states):
                states.append(state.new_zeros(1, ids.shape[1], state.shape[-1]))
            state = state if real_places is None else state.index_select(0, real_places)
            states[number][0].index_copy_(0, places, state)
    if not states:  # nothing but empty questions
        width = model.encoder.config.hidden_size
        states = [torch.zeros(1, 0, width, dtype=model.encoder.dtype, device=ids.device) for _ in wanted]
    return states


def assemble(
    model: LayAlignForConditionalGeneration, soft: torch.Tensor | None, packed: PackedInputs, lengths: Lengths
) -> PackedAssembled:
    """The LLM's row: `[bos][soft prompts][boundary][text]` of each sequence, end to end.

    Args:
        model: with the LLM and the boundary.
        soft: (1, T, Dl), or None.
        packed, lengths: of `check_inputs`.

    Raises:
        ValueError: nothing to read, or more than the LLM takes.
    """
    llm, device = model.llm, packed.encoder_input_ids.device
    embed = llm.get_input_embeddings()
    n = len(lengths.encoder)
    texts = np.asarray(lengths.text if lengths.text is not None else [0] * n)
    bos = model.config.get_text_config().bos_token_id
    softs = np.zeros(n, dtype=np.int64) if soft is None else np.asarray(lengths.encoder)
    before, between = int(bos is not None), int(soft is not None)
    sizes = before + softs + between + texts
    ends = np.cumsum(sizes)
    begins = ends - sizes
    total = int(ends[-1])
    limits.check_new_tokens(model.llm_limit, int(sizes.max()), None)
    if total == 0:
        raise ValueError("nothing for the LLM to read: no bos token, no adapter and no input_ids")

    def put(values: torch.Tensor, places: np.ndarray) -> None:
        row.index_copy_(0, torch.from_numpy(places).to(device), values.to(row.dtype))

    def within(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The places starts[i], starts[i] + 1, ... of counts[i] values each."""
        return np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())

    row = torch.empty(total, model.config.get_text_config().hidden_size, dtype=llm.dtype, device=device)
    if bos is not None:
        bos = bos[0] if isinstance(bos, (list, tuple)) else bos
        put(embed(torch.tensor([[bos]], device=device))[0].expand(n, -1), begins)
    text_places = within(begins + before + softs + between, texts)
    if packed.input_ids is not None:
        ids, _ = sequence.ids_and_mask("input_ids", packed.input_ids, None, embed.num_embeddings)
        put(embed(ids)[0], text_places)
    if soft is not None and model.adapter is not None:
        put(soft[0], within(begins + before, softs))
        put(at_hand(model.adapter, "boundary").expand(n, -1), begins + before + softs)
    positions = torch.from_numpy(np.arange(total) - np.repeat(begins, sizes)).to(device)
    bounds = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)).to(device)
    targets = columns = None
    if packed.labels is not None:
        aligned = torch.full((total,), -100, dtype=torch.long, device=device)
        aligned.index_copy_(0, torch.from_numpy(text_places).to(device), packed.labels[0].long())
        # What stands first in a sequence is predicted by nothing; the position before it is another sequence's.
        aligned = aligned.masked_fill(positions == 0, -100)
        columns = (aligned[1:] != -100).nonzero()[:, 0]
        targets = aligned[None, columns + 1]
    return PackedAssembled(row[None], positions[None], bounds, targets, columns)


def cross_inputs(encoded: PackedEncoded) -> CrossInputs | None:
    """Keys and values as `forward` takes them."""
    return None if encoded.keys is None or encoded.values is None else CrossInputs(encoded.keys, encoded.values, None)


@torch.no_grad()
def check_packable(model: LayAlignForConditionalGeneration) -> None:
    """See that this LLM keeps the sequences of a packed row apart, by trying it: three of two positions, NaN in the second.

    Attention apart, convolutions, recurrent states and linear attention read across, and an LLM that does not take position_ids
    counts on. Afterwards the LLM's attention function is LayAlign's, also where there is no aligner.

    Raises:
        ValueError: an LLM that does not.
    """
    llm = model.llm
    if llm.config.get_text_config(decoder=True)._attn_implementation != NAME:
        swap_attention(llm)
    embed = llm.get_input_embeddings()
    ids = torch.randint(embed.num_embeddings, (1, 2), generator=torch.Generator().manual_seed(0))
    place = embed.weight.device if embed.weight.device.type != "meta" else model.device  # of an offloaded LLM
    tokens = embed(ids.to(place)).to(llm.dtype)
    modes = [(module, module.training) for module in llm.modules()]
    llm.eval()
    try:
        alone = _probed(model, tokens, 1)[0]
        together = _probed(model, torch.cat([tokens, torch.full_like(tokens, torch.nan), tokens], 1), 3)[0]
    finally:
        for module, mode in modes:
            module.training = mode
    coarse = 0.1 if together.dtype in (torch.float16, torch.bfloat16) else 1e-2
    alone, together = alone.float(), together.float()
    for part in (together[:2], together[4:]):
        if not (part - alone).norm() <= coarse * alone.norm():
            raise ValueError(
                f"packed inputs: {type(llm).__name__} does not keep the sequences of a packed row apart: something in it besides "
                "attention (a convolution, a recurrent state, positions that go on) reads across them; train with packing: false"
            )


def _probed(model, embeddings, sequences):
    """Logits (1, S, V) of so many packed sequences of two embeddings each."""
    bounds = torch.arange(0, 2 * sequences + 1, 2, dtype=torch.int32, device=embeddings.device)
    states = CrossStates(None, (), model.config.attention_backend, Packing(bounds, torch.zeros_like(bounds)))
    return model.llm(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(1, 2 * sequences, dtype=torch.bool, device=embeddings.device),
        position_ids=torch.arange(2, device=embeddings.device).repeat(sequences)[None],
        use_cache=False,
        fusion=states,
    ).logits
