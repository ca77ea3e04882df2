"""What the attention kernels do by tile size, descriptors and working ahead, which the interpreter's own launch table does not take."""

import pytest
import torch

from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention, adaptive_fusion_attention_reference
from layalign.kernels.launch import INTERPRETING

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="needs Triton's interpreter")
HEADS, KV_HEADS, WIDTH = 4, 2, 24
# As on a GPU: (rows of queries, keys, descriptors, ahead, block_k) of forward, of key_value_gradients, of query_gradients.
LINES = {
    "pointers": ((64, 32, False, False, 0), (32, 64, False, False, 0), (64, 32, False, False, 0)),
    "descriptors": ((128, 128, True, False, 0), (64, 64, True, False, 0), (128, 64, True, False, 0)),
    "columns": ((16, 32, False, False, 16), (32, 16, False, False, 16), (16, 32, False, False, 16)),
    "ahead": ((32, 32, True, False, 0), (64, 64, True, False, 0), (32, 16, True, True, 0)),
}


@pytest.fixture(params=LINES)
def lines(request, monkeypatch):
    from layalign.kernels.adaptive_fusion_attention.gpu import launch_table
    from layalign.kernels.launch import LaunchConfig

    for kernel, line in zip(("forward", "key_value_gradients", "query_gradients"), LINES[request.param], strict=True):
        rows, keys, descriptors, ahead, block_k = line
        tile = dict(block_m=rows, block_n=keys, block_k=block_k)
        config = LaunchConfig(**tile, warps=4, stages=1, descriptors=descriptors, ahead=ahead)
        monkeypatch.setitem(launch_table._INTERPRETER, kernel, config)
    return request.param


def inputs(batch, queries, keys, cross):
    """Leaves q, k, v, cross_k, cross_v and a gate of one number, laid out as a model's projections."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((queries, HEADS), *((tokens, KV_HEADS) for tokens in (keys, keys, cross, cross)))
    leaves = [torch.randn(batch, *shape, WIDTH, generator=generator).transpose(1, 2) for shape in shapes]
    return [x.requires_grad_() for x in (*leaves, torch.tensor([0.7]))]


def spans(*rows):
    return torch.tensor(rows, dtype=torch.int32)


CALLS = {
    "causal": ((2, 140, 140, 70), {}),
    "fewer queries than keys": ((1, 70, 150, 40), {}),
    "not causal": ((1, 70, 150, 130), {"causal": False}),
    "no cross keys": ((1, 140, 140, 0), {}),
    "spans": ((2, 140, 140, 70), {"key_span": spans((3, 99), (0, 140)), "cross_span": spans((0, 66), (11, 11))}),
    "nothing left": ((2, 70, 70, 40), {"key_span": spans((0, 0), (70, 70)), "cross_span": spans((0, 0), (40, 40))}),
    "packed": (
        (1, 140, 140, 70),
        {"cu_seqlens": spans(0, 60, 60, 140), "cross_cu_seqlens": spans(0, 0, 30, 70)},
    ),
}


def call(lines, name):
    """(batch, queries, keys, cross keys), options; a third of the lengths for the tiles of a quarter."""
    (batch, *lengths), options = CALLS[name]
    if lines == "columns":
        lengths = [length // 3 for length in lengths]
        options = {key: value // 3 if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    return (batch, *lengths), options


@pytest.mark.parametrize("name", CALLS)
def test_lines_agree_with_the_reference(lines, interpreted, name):
    sizes, options = call(lines, name)
    leaves = inputs(*sizes)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    with interpreted.guarded_addresses():
        out = adaptive_fusion_attention(*leaves, backend="triton", **{"causal": True, **options})
        grad_out = torch.randn_like(out)
        grads = torch.autograd.grad(out, leaves, grad_out)
    want = adaptive_fusion_attention_reference(*doubles, **{"causal": True, **options})
    want = [want, *torch.autograd.grad(want, doubles, grad_out.double())]
    for got, expected in zip((out, *grads), want, strict=True):
        torch.testing.assert_close(got, expected.float(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["causal", "spans"])
def test_lines_do_not_change_with_the_batch(lines, interpreted, name):
    (batch, *sizes), options = call(lines, name)
    together = [x.detach() for x in inputs(batch, *sizes)]
    out = adaptive_fusion_attention(*together, backend="triton", causal=True, **options)
    alone = [x[1:] if x.dim() > 1 else x for x in together]
    rows = {key: value[1:] for key, value in options.items()}
    assert torch.equal(out[1:], adaptive_fusion_attention(*alone, backend="triton", causal=True, **rows))


@pytest.mark.parametrize(
    ("heads", "tiles", "rows", "sharing"),
    [(6, 5, 1, 2), (6, 5, 2**30, 2), (7, 3, 2**16, 1), (5, 4, 2**16, 1), (1, 1, 1, 1)],
)
def test_programs_take_each_tile_once_long_ones_first(heads, tiles, rows, sharing):
    import triton
    import triton.language as tl

    from layalign.kernels.adaptive_fusion_attention.gpu.arguments import Constants
    from layalign.kernels.adaptive_fusion_attention.gpu.order import head_and_tile

    @triton.jit
    def note(places, tiles, rows, SHARING: tl.constexpr, C: tl.constexpr):
        head, tile = head_and_tile(tl.program_id(0), tiles, rows, SHARING, C)
        tl.store(places + 2 * tl.program_id(0), head)
        tl.store(places + 2 * tl.program_id(0) + 1, tile)

    note.fn.__globals__["head_and_tile"] = head_and_tile
    places = torch.full((heads * tiles, 2), -1, dtype=torch.int32)
    note[(heads * tiles,)](places, tiles, rows, SHARING=sharing, C=Constants(HEADS=1, HEAD_DIM=64, BLOCK_D=64))
    section = max(2**25 // 256 // rows, 1) * sharing
    sections = [range(first, min(first + section, heads)) for first in range(0, heads, section)]
    assert places.tolist() == [[head, tile] for part in sections for tile in range(tiles) for head in part]
