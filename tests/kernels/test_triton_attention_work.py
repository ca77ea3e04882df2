"""What the Triton kernels of adaptive_fusion_attention compute and keep: no tile that nobody sees, no gradient that nobody
asked for, nothing large between forward and backward."""

from itertools import pairwise

import pytest
import torch

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)
HEADS, KV_HEADS = 2, 1
KERNELS = {"forward_kernel", "key_value_gradients_kernel", "query_gradients_kernel"}  # all that multiply matrices


def tiles_of_32(*numbers, length):
    """(1, length) mask, False in the tiles of these numbers."""
    tile = torch.arange(length) // 32
    return ~sum((tile == number for number in numbers), torch.zeros(length, dtype=torch.bool))[None]


# Queries, keys and cross keys, then the options.
CALLS = {
    "full": (70, 70, 40, {"causal": False}),
    "causal": (130, 130, 40, {}),
    "no_cross": (70, 70, 0, {}),
    "prefill_chunk": (33, 130, 17, {}),
    "decode": (1, 130, 70, {}),
    "start": (33, 130, 0, {"query_start": 20}),
    "window": (130, 130, 5, {"window": 20}),
    "window_start": (33, 130, 5, {"window": 7, "query_start": 50}),
    "window_of_one": (66, 66, 0, {"window": 1}),
    "key_mask": (130, 130, 0, {"key_mask": tiles_of_32(0, 2, length=130), "causal": False}),
    "key_mask_causal": (130, 130, 0, {"key_mask": tiles_of_32(0, 2, length=130)}),
    "left_padding": (96, 96, 40, {"key_mask": tiles_of_32(0, 1, length=96)}),
    "cross_mask": (33, 33, 160, {"cross_mask": tiles_of_32(1, 3, 4, length=160)}),
    "nothing": (33, 33, 70, {"key_mask": tiles_of_32(0, 1, length=33), "cross_mask": tiles_of_32(0, 1, 2, length=70)}),
    "packed": (130, 130, 90, {"cuts": ((0, 33, 33, 100, 130), (0, 17, 50, 50, 90))}),
    "packed_full": (130, 130, 90, {"cuts": ((0, 33, 130), (0, 33, 90)), "causal": False}),
    "packed_masks": (
        128,
        128,
        128,
        {
            "cuts": ((0, 64, 128), (0, 32, 128)),
            "key_mask": tiles_of_32(1, 2, length=128),
            "cross_mask": tiles_of_32(0, 2, length=128),
        },
    ),
}


def visible(queries, keys, cross_keys, options):
    """Per sequence, which queries see which keys and cross keys: (S, N) and (S, T) bool."""
    cuts, cross_cuts = options.get("cuts", ((0, queries), (0, cross_keys)))
    start = options.get("query_start", keys - queries)
    for (begin, end), (cross_begin, cross_end) in zip(pairwise(cuts), pairwise(cross_cuts), strict=True):
        own_keys = end - begin if "cuts" in options else keys
        query, key = start + torch.arange(end - begin)[:, None], torch.arange(own_keys)
        seen = torch.ones(end - begin, own_keys, dtype=torch.bool)
        if options.get("causal", True):
            seen = (key <= query) & (query - key < options.get("window", 10**9))
        cross_seen = torch.ones(end - begin, cross_end - cross_begin, dtype=torch.bool)
        if "key_mask" in options:
            seen = seen & options["key_mask"][:, begin : begin + own_keys]
        if "cross_mask" in options:
            cross_seen = cross_seen & options["cross_mask"][:, cross_begin:cross_end]
        yield seen, cross_seen


def tile_pairs(seen, blocks):
    """How many tiles of a (queries, keys) matrix hold a True."""
    rows, columns = (-(-size // block) * block for size, block in zip(seen.shape, blocks, strict=True))
    padded = torch.zeros(rows, columns, dtype=torch.bool)
    padded[: seen.shape[0], : seen.shape[1]] = seen
    tiles = padded.unflatten(0, (-1, blocks[0])).unflatten(2, (-1, blocks[1]))
    return tiles.any(dim=3).any(dim=1).sum().item()


def check_dots(work, kernel, call, per_self, per_cross):
    """The kernel's products are so many for each visible pair of tiles of each head, and no others."""
    name = f"{kernel}_kernel"
    blocks = work.tiles.get(name, (16, 16))  # a kernel that did not run has 0 products: right where 0 are asked for
    pairs, cross_pairs = (
        sum(tile_pairs(seen, blocks) for seen in column) for column in zip(*visible(*call), strict=True)
    )
    assert work.dots[name] == HEADS * (per_self * pairs + per_cross * cross_pairs), name


@pytest.fixture
def run(attend, interpreted, random_inputs):
    """run(call, wanted): the work of the forward and of the backward."""

    def count(call, wanted):
        *sizes, options = call
        options = dict(options)
        for name, values in zip(("cu_seqlens", "cross_cu_seqlens"), options.pop("cuts", ()), strict=False):
            options[name] = torch.tensor(values, dtype=torch.int32)
        inputs = random_inputs(1, HEADS, KV_HEADS, *sizes, 16, (1,), torch.float32, torch.float32)
        inputs = [x.detach().requires_grad_(index in wanted) for index, x in enumerate(inputs)]
        with interpreted.counted_work() as forward:
            out = attend(*inputs, **options)
        with interpreted.counted_work() as backward:
            if wanted:
                out.sum().backward()
        return forward, backward

    return count


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_only_tiles_that_are_seen_are_computed(run, call):
    forward, backward = run(call, range(6))
    check_dots(forward, "forward", call, 2, 2)
    check_dots(backward, "key_value_gradients", call, 4, 4)
    check_dots(backward, "query_gradients", call, 3, 3)
    assert {name for name, count in (forward.dots + backward.dots).items() if count} <= KERNELS


# Wanted gradients -> products a pair of tiles in the launch for keys and values (self, cross) and in that for queries.
WANTED = {
    "": (0, 0, 0),
    "q": (0, 0, 3),
    "k": (3, 0, 0),
    "v": (2, 0, 0),
    "k v": (4, 0, 0),
    "cross_k": (0, 3, 0),
    "cross_v": (0, 2, 0),
    "cross_k cross_v": (0, 4, 0),
    "gate": (0, 0, 0),
    "v cross_v gate": (2, 2, 0),
    "q cross_k cross_v gate": (0, 4, 3),  # a frozen LLM's own keys and values below the first aligned layer
    "q k v": (4, 0, 3),
    "q k v cross_k cross_v gate": (4, 4, 3),
}


@pytest.mark.parametrize("wanted", WANTED, ids=lambda names: names.replace(" ", "+") or "none")
def test_only_gradients_asked_for_are_computed(cases, run, wanted):
    call = CALLS["prefill_chunk"]
    forward, backward = run(call, [cases.NAMES.index(name) for name in wanted.split()])
    per_self, per_cross, per_query = WANTED[wanted]
    check_dots(forward, "forward", call, 2, 2)
    check_dots(backward, "key_value_gradients", call, per_self, per_cross)
    check_dots(backward, "query_gradients", call, per_query, per_query)
    assert set(backward.dots) <= KERNELS


@pytest.mark.parametrize("return_lse", [False, True], ids=["", "lse"])
@pytest.mark.parametrize("cross_keys", [0, 40])
@pytest.mark.parametrize("kind", ["scalar", "per_query", "masked", "packed", "transposed"])
def test_the_backward_keeps_little(attend, interpreted, cases, kind, cross_keys, return_lse):
    """Besides inputs: the output, both log-sum-exps, at most one more tensor of the output's size, and of each mask the lists of used
    tiles, of 32 keys here: two numbers for a tile, with a few to spare."""
    gate_shape = (1, HEADS, 50) if kind == "per_query" else (1,)
    inputs = cases.random_inputs(
        1, HEADS, KV_HEADS, 50, 50, cross_keys, 32, gate_shape, dtype=torch.float16, gate_dtype=torch.float32
    )
    if kind == "transposed":
        inputs = [x.detach().requires_grad_() for x in cases.laid_out([x.detach() for x in inputs], "transposed")]
    options = {"return_lse": return_lse}
    if kind == "masked":
        options |= {"key_mask": cases.mask("holes", 1, 50), "cross_mask": cases.mask("left", 1, cross_keys)}
    if kind == "packed":
        bounds = torch.tensor([[0, 0], [20, cross_keys // 2], [50, cross_keys]], dtype=torch.int32).T.contiguous()
        options |= dict(zip(("cu_seqlens", "cross_cu_seqlens"), bounds, strict=True))
    given = [x for x in (*inputs, *options.values()) if isinstance(x, torch.Tensor)]
    given = {x.untyped_storage().data_ptr() for x in given}
    kept = {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in given:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        attend(*inputs, **options)
    rows = HEADS * 50
    out_bytes, lse_bytes = rows * 32 * 2, rows * 4
    list_bytes = 2 * (2 * 4 + 4) * 4 if kind == "masked" else 0
    assert 0 < sum(kept.values()) <= (2 if cross_keys else 1) * out_bytes + 2 * lse_bytes + list_bytes


def test_nothing_is_kept_where_no_gradient_is_wanted(attend, interpreted, random_inputs):
    inputs = random_inputs(1, HEADS, KV_HEADS, 20, 20, 5, 16, (1,), torch.float32, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        attend(*(x.detach() for x in inputs))
        with torch.no_grad():
            attend(*inputs)
    assert not kept
