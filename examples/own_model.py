"""A model of one's own with `layalign.nn.AdaptiveFusionAttention`: python examples/own_model.py

A decoder of two layers, from scratch, reads a source by cross-attention and learns to write it backwards; then it decodes with a
cache, where the source is projected once.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from layalign.nn import AdaptiveFusionAttention, FusionCache

WORDS, START, LENGTH, WIDTH = 12, 10, 5, 48


class Block(nn.Module):
    """Attention and a feed-forward part, each after a norm and added.

    Args:
        layer_idx: place in the cache.
    """

    def __init__(self, layer_idx: int):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = AdaptiveFusionAttention(
            WIDTH, 4, num_kv_heads=2, cross_dim=WIDTH, gate="head", layer_idx=layer_idx
        )
        self.feed = nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))

    def forward(self, hidden: torch.Tensor, source: torch.Tensor | None, cache: FusionCache | None) -> torch.Tensor:
        """(B, S, WIDTH) -> the same."""
        hidden = hidden + self.attention(self.norm(hidden), source, cache=cache)
        return hidden + self.feed(self.norm2(hidden))


class Decoder(nn.Module):
    """Writes words while it reads a source."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH + 1, WIDTH)
        self.blocks = nn.ModuleList(Block(index) for index in range(2))
        self.head = nn.Linear(WIDTH, WORDS)

    def embed(self, ids: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Words and their places, from `first` on."""
        return self.words(ids) + self.places(torch.arange(first, first + ids.shape[1]))

    def forward(self, ids: torch.Tensor, source: torch.Tensor | None, cache: FusionCache | None = None) -> torch.Tensor:
        """Logits (B, S, WORDS); with a cache, ids are the new ones and the source is given with the first alone."""
        hidden = self.embed(ids, 0 if cache is None else cache.get_seq_length())
        states = None if source is None else self.embed(source)
        for block in self.blocks:
            hidden = block(hidden, states, cache)
        return self.head(hidden)

    @torch.no_grad()
    def write(self, source: torch.Tensor) -> torch.Tensor:
        """The likeliest words for a source (B, LENGTH)."""
        cache, ids = FusionCache(), torch.full((len(source), 1), START)
        written = []
        for step in range(LENGTH):
            logits = self(ids, source if step == 0 else None, cache)
            written.append(ids := logits[:, -1:].argmax(-1))
        return torch.cat(written, 1)


def main(steps: int = 120) -> float:
    """Train, then write. -> the share of sources written backwards without a mistake."""
    torch.manual_seed(0)
    model = Decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        source = torch.randint(10, (64, LENGTH))
        target = source.flip(1)
        logits = model(F.pad(target[:, :-1], (1, 0), value=START), source)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 40 == 0:
            print(f"step {step}: loss {loss.item():.2f}")
    source = torch.randint(10, (64, LENGTH))
    written = model.write(source)
    right = (written == source.flip(1)).all(1).float().mean().item()
    print(f"{source[0].tolist()} -> {written[0].tolist()}; {right:.0%} right")
    return right


if __name__ == "__main__":
    main()
