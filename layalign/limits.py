"""How many tokens a base reads: those that look positions up in a learned table end inside transformers past it."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache


def position_limit(base: Any) -> int | None:
    """The most tokens that a transformers model reads, where it looks positions up in a learned table (BERT, XLM-R, BART, GPT-2,
    OPT); None: any number."""
    for name, module in base.named_modules():
        name = name.rpartition(".")[2]
        if isinstance(module, torch.nn.Embedding) and ("position" in name or name == "wpe"):
            # RoBERTa and its like count positions from the one behind their padding's.
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return base.config.get_text_config().max_position_embeddings - unused
    return None


def check_positions(
    limit: int | None, tokens: torch.Tensor, positions: torch.Tensor | None, past: Cache | None = None
) -> None:
    """Before the LLM reads.

    Args:
        limit: of the LLM.
        tokens: (B, S) or (B, S, Dl), what it reads.
        positions: (B, S) long of these, or None.
        past: what it has read before.

    Raises:
        ValueError: more than the limit. On a GPU only what the shapes tell is looked at, the rest would be a wait.
    """
    if limit is None:
        return
    longest = tokens.shape[1]
    looking_is_free = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
    if looking_is_free and positions is not None and positions.numel():
        longest = int(positions.max()) + 1
    elif looking_is_free and past is not None:
        longest += int(past.get_seq_length())
    _refuse_longer(limit, longest)


def check_new_tokens(limit: int | None, tokens: int, new: int | None) -> None:
    """Before tokens are generated.

    Args:
        limit: of the LLM.
        tokens: the longest row that it reads.
        new: the most tokens that may follow; None: unknown.

    Raises:
        ValueError: more than the limit; the last new token is not read.
    """
    if limit is None:
        return
    _refuse_longer(limit, tokens)
    if new is not None and tokens + new - 1 > limit:
        raise ValueError(
            f"max_new_tokens: got {new} after {tokens} tokens, the LLM takes {limit} in all; at most {limit - tokens + 1}"
        )


def _refuse_longer(limit, longest):
    if longest > limit:
        raise ValueError(
            f"the LLM would read {longest} tokens in a row (soft prompts, one for each of the encoder's tokens, and text), it takes "
            f"{limit}; give shorter questions or prompts"
        )
