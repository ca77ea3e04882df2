"""The model's logits from module internals, by a slow formula that shares no code with projections, fusion or kernels.

The LLM's own modules compute everything but the attention itself, which is written out here; cross keys and values are what the LLM's
own attention modules make of the aligner's streams without RoPE.
"""

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from layalign.probing import made_by

NAME = "slow"
CROSS = {}  # id of an attention module -> keys and values (B, T, Hkv, D), mask (B, T), gate


def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    """softmax(q k) v + gate softmax(q k') v', with transformers' own additive mask; the LLM's soft cap and sinks are its own term's."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]

    def term(key, value, mask, softcap=None, sinks=None):
        scores = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + mask
        if sinks is not None:
            column = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ value.repeat_interleave(groups, 1)
        return scores.softmax(-1) @ value.repeat_interleave(groups, 1)

    out = term(key, value, 0 if attention_mask is None else attention_mask[..., : key.shape[2]], softcap, s_aux)
    if id(module) in CROSS:
        cross_keys, cross_values, mask, gate = CROSS[id(module)]
        hidden = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[:, None, None]
        out = out + gate * term(cross_keys.transpose(1, 2), cross_values.transpose(1, 2), hidden)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)


def read(model, batch):
    """What the LLM reads: embeddings (B, S, Dl), mask (B, S) bool, positions (B, S)."""
    encoded = model.encode(batch["encoder_input_ids"], batch["encoder_attention_mask"])
    embeddings, mask, *_ = model.assemble(encoded.soft, encoded.mask, batch["input_ids"], batch["attention_mask"])
    return embeddings, mask, (mask.long().cumsum(1) - 1).clamp(min=0)


def bare_logits(model, batch, implementation):
    """Logits of the LLM by another attention implementation of transformers, without cross states."""
    before = model.llm.config._attn_implementation
    embeddings, mask, positions = read(model, batch)
    model.llm.set_attn_implementation(implementation)
    try:
        return model.llm(inputs_embeds=embeddings, attention_mask=mask.long(), position_ids=positions).logits
    finally:
        model.llm.set_attn_implementation(before)


def encoder_states(model, batch):
    """States (E, B, T, De) of the questions, each read alone, and their mask (B, T)."""
    rows = [
        torch.stack(model.encoder(input_ids=ids[mask.bool()][None], output_hidden_states=True).hidden_states)[:, 0]
        for ids, mask in zip(batch["encoder_input_ids"], batch["encoder_attention_mask"], strict=True)
    ]
    longest = max(row.shape[1] for row in rows)
    states = [torch.nn.functional.pad(row, (0, 0, 0, longest - row.shape[1])) for row in rows]
    mask = torch.arange(longest) < torch.tensor([row.shape[1] for row in rows])[:, None]
    return torch.stack(states, 1)[model.config.mixed_states], mask


def cross_states(model, batch):
    """For each fused layer keys and values (B, T, Hkv, D), and the mask (B, T)."""
    states, mask = encoder_states(model, batch)
    aligner = model.aligner
    if aligner.average:
        states = states.mean(0, keepdim=True)
    mixed = torch.einsum("ge,ebtd->gbtd", aligner.mix.weight, states) + aligner.mix.bias[:, None, None, None]
    mixed = mixed.relu()
    if aligner.inner is not None:
        mixed = mixed @ aligner.inner.weight.T + aligner.inner.bias
        mixed = mixed * mixed.sigmoid()  # SiLU
    streams = mixed @ aligner.project.weight.T + aligner.project.bias
    modules = [projection.attention for projection in model._projections]
    rows, tokens = mask.shape
    made = made_by(model.llm, modules, torch.stack([streams[0::2].flatten(1, 2), streams[1::2].flatten(1, 2)]))
    return [[part.unflatten(0, (rows, tokens)) for part in pair] for pair in made], mask


@torch.no_grad()
def slow_logits(model, batch):
    """The whole formula."""
    made, mask = cross_states(model, batch)
    for projection, (keys, values) in zip(model._projections, made, strict=True):
        CROSS[id(projection.attention)] = keys, values, mask, projection.attention.fusion_gate.value
    try:
        return bare_logits(model, batch, NAME)
    finally:
        CROSS.clear()
