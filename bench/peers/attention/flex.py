"""FlexAttention: both calls and the sum compiled together, for one case: of too many shapes Dynamo compiles no more."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.cases.attention import AttentionCase
from bench.peers import needs_cuda
from bench.peers.attention.two_calls import Attention, two_calls


def flex(case: AttentionCase) -> Attention:
    """The compiled function of this case."""
    torch.compiler.reset()
    mask = None
    if case.queries > 1:
        mask = create_block_mask(_not_ahead, None, None, case.queries, case.keys, device=case.device)

    def attention(q, k, v, is_causal):
        grouped = case.heads != case.kv_heads
        return flex_attention(q, k, v, block_mask=mask if is_causal else None, enable_gqa=grouped)

    return torch.compile(partial(two_calls, attention), fullgraph=True, dynamic=False)


def _not_ahead(batch, head, query, key):
    return query >= key


_FLEX = {"flex": needs_cuda("flex", flex)}
PEERS = {"attention": _FLEX, "decode": _FLEX}
