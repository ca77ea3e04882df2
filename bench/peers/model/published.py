"""The published scheme, written anew: every attention call projects its query a second time, projects the cross keys and
values again and passes the cross result through the output projection on its own; all streams of the aligner are made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from bench.model_systems import BareLLM, Prompted, System, Trained, assemble, llm_inputs
from bench.peers.aligner.published import mix
from layalign.sequence import last_column


class Published(System, BareLLM):
    """eager: as the authors' code runs, with attention weights and the logits of all positions in memory. Otherwise with
    PyTorch's attention and only the logits that are needed, which its authors could have had. The encoder is the same."""

    def __init__(
        self,
        encoder: PreTrainedModel,
        llm: PreTrainedModel,
        batch: dict[str, Tensor],
        trained: Trained,
        *,
        eager: bool,
    ):
        self.eager = eager
        if eager:
            llm.set_attn_implementation("eager")
        System.__init__(self, llm, trained)
        BareLLM.__init__(self, encoder, llm, batch, trained)
        real = batch["encoder_attention_mask"].bool()
        self.cross_mask = None if bool(real.all()) else real[:, None, None]
        self.streams = None
        for index, layer in enumerate(llm.model.layers):
            layer.self_attn.forward = self._with_cross(layer.self_attn, layer.self_attn.forward, index)

    def loss(self) -> Tensor:
        """Of the targets' tokens."""
        prompted = self._read()
        if self.eager:
            return self.llm(**llm_inputs(prompted), labels=prompted.labels).loss
        return self.llm_loss(prompted)

    def train_step(self) -> list[Tensor]:
        """As every system's, with the streams of one step alone in memory."""
        results = System.train_step(self)
        self.streams = None  # or the next step would count their memory as there before it
        return results

    @torch.no_grad()
    def prefill(self) -> list[Tensor]:
        """Logits (B, V) of the first new token."""
        kept = {} if self.eager else last_column(self.llm)  # without: all
        logits = self.llm(**llm_inputs(self._read()), **kept).logits[:, -1]
        self.streams = None
        return [logits]

    @torch.no_grad()
    def generate(self, tokens: int, **settings: Any) -> Any:
        """So many new tokens."""
        return self.generate_from(self._read(), tokens, **settings)

    def _read(self) -> Prompted:
        """Through encoder, aligner and adapter."""
        states = [state.to(self.llm.dtype) for state in self.encode()]
        adapter, aligner = self.trained.adapter, self.trained.aligner
        streams = mix(states[:-1], *_weights(aligner.mix, states[0].dtype))
        self.streams = linear(streams, *_weights(aligner.project, streams.dtype))
        return assemble(self.llm, adapter(states[-1]), adapter.boundary, self.batch)

    def _with_cross(self, attention, forward, index):
        def heads(states):
            return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

        def forward_with_cross(hidden_states, position_embeddings, **kwargs):
            out, weights = forward(hidden_states=hidden_states, position_embeddings=position_embeddings, **kwargs)
            query = heads(attention.q_proj(hidden_states))
            query, _ = apply_rotary_pos_emb(query, query, *position_embeddings)
            attention.v_proj(hidden_states)  # the published code runs it, for the dtype of its result
            keys = heads(attention.k_proj(self.streams[2 * index]))
            values = heads(attention.v_proj(self.streams[2 * index + 1]))
            cross = attention.o_proj(self._attend(query, keys, values).transpose(1, 2).flatten(2))
            return out + self.trained.gates[index].to(out.dtype) * cross, weights

        return forward_with_cross

    def _attend(self, query, keys, values):
        """query (B, Hq, S, D), keys and values (B, Hkv, T, D) -> (B, Hq, S, D)."""
        if not self.eager:
            return scaled_dot_product_attention(query, keys, values, attn_mask=self.cross_mask, enable_gqa=True)
        group = query.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        scores = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
        if self.cross_mask is not None:
            scores = scores.masked_fill(~self.cross_mask, -torch.inf)
        return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ values


def _weights(layer, dtype):
    """Of a linear layer, as autocast hands them to it."""
    return layer.weight.to(dtype), layer.bias.to(dtype)


PEERS = {
    "model": {
        "published sdpa": lambda compared: compared.system(Published, eager=False),
        "published eager": lambda compared: compared.system(Published, eager=True),
    }
}
