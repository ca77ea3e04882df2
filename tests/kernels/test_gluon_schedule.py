"""The Hopper forward's agents in every order: no race, no deadlock, and both are found where the kernel is broken on purpose."""

import pytest
import torch

from layalign.kernels.adaptive_fusion_attention.call import Call
from layalign.kernels.adaptive_fusion_attention.gpu.arguments import Prepared
from tests.kernels.gluon_machine import Event

pytest.importorskip("triton.experimental.gluon")


@pytest.fixture(scope="module")
def on_cpu(gluon_on_cpu):
    return gluon_on_cpu


def call(keys, cross_keys, queries=128, **options):
    generator = torch.Generator().manual_seed(keys)
    lengths = (queries, keys, keys, cross_keys, cross_keys)
    tensors = [torch.randn(1, 1, length, 64, generator=generator).half() for length in lengths]
    return Call(*tensors, torch.ones(1), scale=0.125, **options)


def states(on_cpu, interleavings, given, stages, mutations=(), strict=False):
    """States of the first program of a call."""
    from layalign.kernels.adaptive_fusion_attention.gluon.forward import forward

    _, machines = on_cpu.run_on_cpu(lambda: forward(Prepared(given)), mutations=mutations, stages=stages, strict=strict)
    counts = {place: barrier.count for place, barrier in machines[0].barriers.items()}
    return interleavings.search(machines[0].traces, counts)


# Self and cross keys, and what else: one tile and several of either, none that is seen, and a band of a window.
CALLS = {
    "one tile each": (128, 100, {}),
    "many": (500, 300, {}),
    "self alone": (400, 0, {}),
    "nothing seen": (128, 0, {"query_start": 0, "causal": False}),
    "window": (600, 128, {"window": 150}),
}


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("keys, cross_keys, options", CALLS.values(), ids=CALLS)
def test_no_race_and_no_deadlock(on_cpu, gluon_interleavings, keys, cross_keys, options, stages):
    assert states(on_cpu, gluon_interleavings, call(keys, cross_keys, **options), stages) > 50


# What somebody might get wrong -> (text of the kernel, what stands there instead).
BROKEN = {
    "K is not released": ("        release(places.k, number, C)\n", ""),
    "K's first is not released": ("        release(places.k, 0, C)\n", ""),
    "V is not released": ("        release(places.v, number - 1, C)\n", ""),
    "V's last is not released": ("    release(places.v, number, C)\n    return b_sum", "    return b_sum"),
    "the producer waits for the other phase": ("phase ^ 1", "phase"),
    "the groups wait for the other phase": ("ring.full.index(place), phase)", "ring.full.index(place), phase ^ 1)"),
    "phases change with every tile": ("tile // STAGES % 2", "tile % 2"),
    "phases change a tile late": ("tile // STAGES % 2", "(tile - 1) // STAGES % 2"),
    "a place too few": ("return tile % STAGES,", "return tile % (STAGES - 1),"),
    "a place more than there are phases of": ("return tile % STAGES,", "return (tile + tile // 3) % STAGES,"),
    "one group empties a place": ("count=GROUPS", "count=1"),
    "three groups empty a place": ("count=GROUPS", "count=3"),
    "nobody waits for a tile": ("    mbarrier.wait(ring.full.index(place), phase)\n", ""),
    "the producer does not wait": ("    mbarrier.wait(ring.empty.index(place), phase ^ 1)\n", ""),
    "V is released before it is read": ("b_sum = warpgroup_mma_wait(0, deps=[s_sum])", "b_sum = warpgroup_mma_wait(1, deps=[s_sum])"),
    "half the bytes": ("C.BLOCK_N * C.HEAD_DIM * 2)", "C.BLOCK_N * C.HEAD_DIM)"),
    "K of a tile too far": ("fill(k_ring, number, keys, tile", "fill(k_ring, number + 1, keys, tile"),
    "V of one's own tile first": (
        "        fill(k_ring, number, keys, tile_number * C.BLOCK_N, C)\n"
        "        fill(v_ring, number - 1, weighted, (tile_number - 1) * C.BLOCK_N, C)\n",
        "        fill(v_ring, number - 1, weighted, (tile_number - 1) * C.BLOCK_N, C)\n"
        "        fill(v_ring, number, weighted, (tile_number - 1) * C.BLOCK_N, C)\n",
    ),
    "K is released before it is read": ("        b_scores = warpgroup_mma_wait(1, ", "        b_scores = warpgroup_mma_wait(2, "),
    "the self tiles start a tile late": ("cross.end - cross.begin, C", "cross.end - cross.begin + 1, C"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", BROKEN.values(), ids=BROKEN)
def test_the_search_finds(on_cpu, gluon_interleavings, mutation):
    with pytest.raises((gluon_interleavings.Race, gluon_interleavings.Deadlock)):
        states(on_cpu, gluon_interleavings, call(700, 300), 2, (mutation,))


# What has no order, and shows when a program runs.
WRONG = {
    "no fence": ("C))\n    fence_async_shared()\n    numbers", "C))\n    numbers"),
    "a running product's scores are used": ("b_scores = warpgroup_mma_wait(1,", "b_scores = warpgroup_mma_wait(2,"),
    "no descriptor of no rows": ("shape=[max(term.keys, 1), C.HEAD_DIM]", "shape=[term.keys, C.HEAD_DIM]"),
}


@pytest.mark.parametrize("mutation", WRONG.values(), ids=WRONG)
def test_a_run_finds(on_cpu, gluon_interleavings, mutation):
    given = call(200, 300, query_start=0)
    if "term.keys" in mutation[0]:
        given = call(200, 300, causal=True, query_start=torch.tensor([-300]))
    with pytest.raises(on_cpu.Wrong):
        states(on_cpu, gluon_interleavings, given, 2, (mutation,), strict=True)


def test_two_agents_and_one_place(gluon_interleavings):
    """The search itself: as many states as one counts by hand, and what it says where the reader never or too early arrives."""
    full, empty, place = (1, 0), (2, 0), (3, 0)
    filled = [Event("expect", full, 8), Event("copy", full, 8, (place,))]
    filling = [Event("wait", empty, 1), *filled, Event("wait", empty, 0), *filled]
    use = [Event("product", None, 0, (place,)), Event("retire"), Event("arrive", empty, 1)]
    using = [Event("wait", full, 0), *use, Event("wait", full, 1), *use]
    counts = {full: 1, empty: 1}
    # No step but one is possible anywhere: 3 of the producer, a copy lands, 4 of the reader, and all that again.
    assert gluon_interleavings.search({"a": filling, "b": using}, counts) == 17
    with pytest.raises(gluon_interleavings.Deadlock):
        gluon_interleavings.search({"a": filling, "b": [x for x in using if x.kind != "arrive"]}, counts)
    with pytest.raises(gluon_interleavings.Race, match="overwritten while"):
        early = [using[0], using[1], using[3], using[2], *using[4:]]
        gluon_interleavings.search({"a": filling, "b": early}, counts)
    with pytest.raises(gluon_interleavings.Race, match="never reads 1 of 2"):
        gluon_interleavings.search({"a": filling, "b": using[:4]}, counts)
