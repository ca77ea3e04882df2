"""The published scheme, written anew: every attention call projects its query a second time, projects the cross keys and
values again and passes the cross result through the output projection on its own; all streams of the aligner are made."""

import torch
from model_systems import BareLLM, System, assemble, llm_inputs
from published_aligner import published_mix
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


class Published(System, BareLLM):
    """eager: as the authors' code runs, with attention weights and the logits of all positions in memory. Otherwise with
    PyTorch's attention and only the logits that are needed, which its authors could have had. The encoder is the same."""

    def __init__(self, encoder, llm, batch, trained, *, eager):
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

    def loss(self):
        embeddings, mask, labels = self._read()
        if self.eager:
            return self.llm(**llm_inputs(embeddings, mask), labels=labels).loss
        return self.llm_loss(embeddings, mask, labels)

    def train_step(self):
        results = System.train_step(self)
        self.streams = None  # or the next step would count their memory as there before it
        return results

    @torch.no_grad()
    def prefill(self):
        embeddings, mask, _ = self._read()
        kept = 0 if self.eager else 1  # 0: all
        logits = self.llm(**llm_inputs(embeddings, mask), logits_to_keep=kept).logits[:, -1]
        self.streams = None
        return [logits]

    @torch.no_grad()
    def generate(self, tokens, **settings):
        embeddings, mask, _ = self._read()
        return self.generate_from(embeddings, mask, tokens, **settings)

    def _read(self):
        """Encoder, aligner and adapter -> what `assemble` returns."""
        states = [state.to(self.llm.dtype) for state in self.encode()]
        adapter, aligner = self.trained.adapter, self.trained.aligner
        streams = published_mix(states[:-1], *_weights(aligner.mix, states[0].dtype))
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
