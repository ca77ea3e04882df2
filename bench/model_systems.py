"""What the model suites compare: the bare LLM and LayAlign, over the same frozen weights and on the same batch.

A system takes a training step, prefills and generates, and returns what it computed, to be checked.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LogitsProcessor, PreTrainedModel

from layalign import LayAlignForConditionalGeneration
from layalign.projections import attention_modules
from layalign.sequence import last_column


@dataclass
class Trained:
    """The trained part: LayAlign's modules, and a gate (1,) of each LLM layer."""

    adapter: torch.nn.Module
    aligner: torch.nn.Module
    gates: list[torch.nn.Parameter]

    def parameters(self) -> list[torch.nn.Parameter]:
        """What an optimizer step changes."""
        return [*self.gates, *self.aligner.parameters(), *self.adapter.parameters()]

    def gradients(self) -> list[Tensor]:
        """All gates' as one tensor: one gate's is a sum that may come out near 0."""
        modules = (*self.aligner.parameters(), *self.adapter.parameters())
        return [torch.cat([gate.grad for gate in self.gates]), *(parameter.grad for parameter in modules)]

    def copied(self, dtype: torch.dtype = torch.float32) -> Trained:
        """The same values, for another system to train."""
        modules = (copy.deepcopy(module).to(dtype) for module in (self.adapter, self.aligner))
        return Trained(*modules, [torch.nn.Parameter(gate.detach().clone().to(dtype)) for gate in self.gates])


class System:
    """trained: what an optimizer step changes. Results whose rounding is to be allowed for are of the LLM's dtype."""

    def __init__(self, llm: PreTrainedModel, trained: Trained):
        self.dtype, self.trained = llm.dtype, trained
        self.optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-5)

    def train_step(self) -> list[Tensor]:
        """Forward, backward and AdamW. Returns loss and gradients of the trained part."""
        loss = self.loss()
        loss.backward()
        results = [loss.detach().to(self.dtype), *self.trained.gradients()]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return results

    def forced(self, forced_ids: Tensor, tokens: int, **settings: Any) -> list[Tensor]:
        """Generate the given tokens (B, n), then more up to `tokens`. Returns the logits (B, n, V) that chose them."""
        force = ForcedTokens(forced_ids)
        settings |= {"logits_processor": [force], "return_dict_in_generate": True, "output_logits": True}
        logits = self.generate(tokens, **settings).logits
        return [torch.stack(logits[: forced_ids.shape[1]], dim=1).to(self.dtype)]


class LayAlign(System):
    """This library's model."""

    def __init__(self, encoder: PreTrainedModel, llm: PreTrainedModel, batch: dict[str, Tensor], training: bool):
        self.model = LayAlignForConditionalGeneration.from_bases(encoder, llm).to(llm.device).train(training)
        self.batch = batch
        modules = attention_modules(llm)
        gates = [modules[layer].fusion_gate.value for layer in self.model.config.fused_layers]
        with torch.no_grad():
            for index, gate in enumerate(gates):  # a fresh gate is 0 and would hide the cross-attention
                gate.fill_(0.05 + 0.1 * index / len(gates))
        super().__init__(llm, Trained(self.model.adapter, self.model.aligner, gates))

    def take(self, trained: Trained) -> LayAlign:
        """This system with the values of another's trained part."""
        with torch.no_grad():
            for mine, theirs in zip(self.trained.parameters(), trained.parameters(), strict=True):
                mine.copy_(theirs)
        return self

    def loss(self) -> Tensor:
        """Of the targets' tokens."""
        return self.model(**self.batch).loss

    @torch.no_grad()
    def prefill(self) -> list[Tensor]:
        """Logits (B, V) of the first new token."""
        return [self.model(**self.batch, logits_to_keep=1).logits[:, -1]]

    def generate(self, tokens: int, **settings: Any) -> Any:
        """So many new tokens."""
        return self.model.generate(**self.batch, max_new_tokens=tokens, do_sample=False, **settings)


class BareLLM:
    """The plain LLM on what LayAlign reads there, worked out beforehand; the plain encoder runs before it."""

    def __init__(self, encoder: PreTrainedModel, llm: PreTrainedModel, batch: dict[str, Tensor], trained: Trained):
        self.encoder, self.llm, self.batch = encoder, llm, batch
        with torch.no_grad():
            soft = trained.adapter(self.encode()[-1])
            self.prompted = assemble(llm, soft, trained.adapter.boundary, batch)
        self.prompted.embeddings.requires_grad_(self.prompted.labels is not None)

    def encode(self) -> tuple[Tensor, ...]:
        """All hidden states of the encoder, (B, T, De) each."""
        with torch.no_grad():
            return self.encoder(
                input_ids=self.batch["encoder_input_ids"],
                attention_mask=self.batch["encoder_attention_mask"],
                output_hidden_states=True,
            ).hidden_states

    def train_step(self) -> list[Tensor]:
        """Forward and backward. Returns the loss: it trains nothing, but as with every soft prompt the embeddings get a
        gradient."""
        self.encode()
        loss = self.llm_loss(self.prompted)
        loss.backward()
        self.prompted.embeddings.grad = None
        return [loss.detach()]

    @torch.no_grad()
    def prefill(self) -> list[Tensor]:
        """Logits (B, V) of the first new token."""
        self.encode()
        return [self.llm(**llm_inputs(self.prompted), **last_column(self.llm)).logits[:, -1]]

    @torch.no_grad()
    def generate(self, tokens: int, **settings: Any) -> Any:
        """So many new tokens."""
        self.encode()
        return self.generate_from(self.prompted, tokens, **settings)

    def generate_from(self, prompted: Prompted, tokens: int, **settings: Any) -> Any:
        """What `generate` of transformers returns."""
        settings |= {"max_new_tokens": tokens, "do_sample": False} | last_column(self.llm)
        return self.llm.generate(inputs_embeds=prompted.embeddings, attention_mask=prompted.mask.long(), **settings)

    def llm_loss(self, prompted: Prompted) -> Tensor:
        """Of the columns alone that predict a label."""
        following = prompted.labels[:, 1:]
        columns = (following != -100).any(dim=0).nonzero().flatten()
        hidden = self.llm.model(**llm_inputs(prompted)).last_hidden_state
        return self.head_loss(hidden[:, columns].flatten(0, 1), following[:, columns].flatten())

    def head_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden (N, Dl), targets (N,)."""
        logits = self.llm.lm_head(hidden)
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets)


class PackedBareLLM(BareLLM):
    """The plain LLM on the rows end to end, kept apart by transformers' own way, positions that begin anew; the plain encoder reads
    padded rows."""

    def __init__(self, encoder: PreTrainedModel, llm: PreTrainedModel, batch: dict[str, Tensor], trained: Trained):
        super().__init__(encoder, llm, batch, trained)
        mask = self.prompted.mask
        self.positions = ((mask.long().cumsum(dim=1) - 1)[mask])[None]
        embeddings = self.prompted.embeddings.detach()[mask][None].requires_grad_()
        self.prompted = Prompted(embeddings, mask[mask][None], self.prompted.labels[mask][None])

    def llm_loss(self, prompted: Prompted) -> Tensor:
        """Of the columns alone that predict a label."""
        following = prompted.labels[0, 1:]
        columns = (following != -100).nonzero().flatten()
        inputs = {"inputs_embeds": prompted.embeddings, "position_ids": self.positions, "use_cache": False}
        hidden = self.llm.model(**inputs).last_hidden_state
        return self.head_loss(hidden[0, columns], following[columns])


class ForcedTokens(LogitsProcessor):
    """Leaves generation no choice for as many tokens as are given, (B, n)."""

    def __init__(self, ids: Tensor):
        self.ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] >= self.ids.shape[1]:
            return scores
        chosen = self.ids[:, input_ids.shape[1], None]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class Prompted(NamedTuple):
    """What the LLM reads: embeddings (B, S, Dl), mask (B, S) bool, labels (B, S) or None where the batch has none."""

    embeddings: Tensor
    mask: Tensor
    labels: Tensor | None


def assemble(llm: PreTrainedModel, soft: Tensor, boundary: Tensor, batch: dict[str, Tensor]) -> Prompted:
    """[bos][soft prompts][boundary][text] with all padding moved to the left."""
    embed, rows = llm.get_input_embeddings(), len(soft)
    bos = torch.full((rows, 1), llm.config.bos_token_id, device=soft.device)
    parts = [embed(bos), soft.to(llm.dtype), boundary.to(llm.dtype).expand(rows, 1, -1), embed(batch["input_ids"])]
    one = torch.ones_like(bos)
    mask = torch.cat([one, batch["encoder_attention_mask"], one, batch["attention_mask"]], dim=1).bool()
    order = mask.to(torch.int8).argsort(dim=1, stable=True)[:, -int(mask.sum(1).max()) :]
    embeddings = torch.cat(parts, dim=1)
    embeddings = embeddings.gather(1, order[..., None].expand(-1, -1, embeddings.shape[-1]))
    mask = mask.gather(1, order)
    labels = batch.get("labels")
    if labels is not None:
        labels = F.pad(labels, (soft.shape[1] + 2, 0), value=-100)
        labels = labels.gather(1, order).masked_fill(~mask, -100)
    return Prompted(embeddings, mask, labels)


def llm_inputs(prompted: Prompted) -> dict[str, Any]:
    """Positions count real tokens; the mask goes on to the LLM."""
    position_ids = (prompted.mask.long().cumsum(dim=1) - 1).clamp_(min=0)
    return {
        "inputs_embeds": prompted.embeddings,
        "attention_mask": prompted.mask.long(),
        "position_ids": position_ids,
        "use_cache": False,
    }
