"""Decoding over keys and values that lie in pages: the decode kernels, with block tables in place of masks."""

from __future__ import annotations

import triton
from torch import Tensor

from ..paged import PagedCall
from .arguments import LONGEST_WINDOW, contiguous, gate_rows, is_wide, rows, unit_stride
from .decode import Decoded, Lengths, Place, attend_in_chunks, config_of, empty_results
from .decode_rows import DecodeMasks
from .launch_table import paged_config
from .rows import Rows
from .terms import Inputs


def decode_pages(call: PagedCall, return_lse: bool) -> Decoded:
    """The results of a call of at least one query and one batch row, whose scale is given; `out` None where the call brings one."""
    q, queries = unit_stride(call.q), call.q.shape[2]
    page, cross_page = call.k_cache.shape[1], call.cross_k_cache.shape[1]
    keys, cross_keys = call.block_table.shape[1] * page, call.cross_block_table.shape[1] * cross_page
    results = empty_results(q, return_lse, cross_keys > 0, call.out)
    config = paged_config(config_of(q, call.k_cache.shape[2]))
    window = None if call.window is None else min(call.window, LONGEST_WINDOW)
    chunks = triton.cdiv(keys, config.block_n)
    if window is not None:  # which may begin and end within a chunk
        chunks = min(chunks, triton.cdiv(window + queries - 1, config.block_n) + 1)
    caches = (call.k_cache, call.v_cache, call.cross_k_cache, call.cross_v_cache)
    tables = (call.block_table, call.cross_block_table)
    attend_in_chunks(
        config,
        Inputs(rows(q), *map(_pages, caches), gate_rows(call.gate, q), contiguous(call.sink)),
        results,
        DecodeMasks(None, None, None, None, *tables, call.seq_lens, call.cross_seq_lens),
        Lengths(*(table.stride(0) for table in tables), queries, keys, cross_keys),
        Place(0, 0, window, chunks),
        (call.scale, call.softcap, 1),
        GROUP=q.shape[1] // call.k_cache.shape[2],
        WIDE=is_wide((x.transpose(1, 2) for x in caches), max(page, cross_page)),
        CAUSAL=True,
        PAGE=page,
        CROSS_PAGE=cross_page,
    )
    return results if call.out is None else results._replace(out=None)


def _pages(cache: Tensor) -> Rows:
    """A cache (pages, PAGE, Hkv, D) as Rows, of which the first stride is that of pages."""
    page, row, head = cache.stride()[:3]
    return Rows(cache, page, head, row)
