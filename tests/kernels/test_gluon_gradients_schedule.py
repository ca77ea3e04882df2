"""The agents of the Hopper gradients in every order: no race, no deadlock, and both are found where a kernel is broken on purpose."""

import pytest
import torch

from layalign.kernels.adaptive_fusion_attention.call import Call
from layalign.kernels.adaptive_fusion_attention.gpu.backward import backward
from layalign.kernels.adaptive_fusion_attention.gpu.forward import ForwardResults

hopper = pytest.importorskip("layalign.kernels.adaptive_fusion_attention.gluon.backward")
hopper_forward = pytest.importorskip("layalign.kernels.adaptive_fusion_attention.gluon.forward")


def call(keys, cross_keys, queries, heads=1, **options):
    generator = torch.Generator().manual_seed(keys)
    sizes = ((heads, queries), (1, keys), (1, keys), (1, cross_keys), (1, cross_keys))
    tensors = [torch.randn(1, *size, 64, generator=generator).half() for size in sizes]
    return Call(*tensors, torch.ones(1), scale=0.125, **options)


KEYS, QUERIES = (False, True, True, True, True, False), (True, False, False, False, False, False)


@pytest.fixture
def states(gluon_on_cpu, gluon_interleavings, monkeypatch):
    """states(wanted, call, stages, program, mutations, strict): of one program of the kernel of the gradients wanted, KEYS or QUERIES."""
    monkeypatch.setenv("LAYALIGN_GLUON", "1")
    monkeypatch.setattr(hopper_forward, "FEWEST_QUERIES", 1)

    def count(wanted, given, stages, program=0, mutations=(), strict=False):
        lse = torch.zeros(2, *given.q.shape[:3])
        results = ForwardResults(*[torch.zeros_like(given.q)] * 3, lse)
        _, machines = gluon_on_cpu.run_on_cpu(
            lambda: backward(torch.ones_like(given.q), results, given, wanted),
            mutations=mutations,
            stages=stages,
            strict=strict,
        )
        counts = {place: barrier.count for place, barrier in machines[program].barriers.items()}
        return gluon_interleavings.search(machines[program].traces, counts)

    return count


# Keys, cross keys, queries, heads of a group, options; the program, of which the cross tiles' are the first.
CALLS = {
    "one tile": (100, 30, 60, 1, {}, 0),
    "many": (300, 300, 300, 1, {}, 0),
    "several heads": (128, 0, 128, 3, {}, 0),
    "own keys": (300, 200, 300, 2, {}, 3),
    "nobody sees them": (300, 0, 100, 2, {"query_start": 0}, 2),
    "window": (500, 0, 500, 1, {"window": 100}, 1),
}


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("keys, cross_keys, queries, heads, options, program", CALLS.values(), ids=CALLS)
def test_no_race_and_no_deadlock(states, keys, cross_keys, queries, heads, options, program, stages):
    found = states(KEYS, call(keys, cross_keys, queries, heads, **options), stages, program)
    assert found == 1 if "query_start" in options else found > 50


# What somebody might get wrong -> (text of the kernel, what stands there instead).
BROKEN = {
    "a place is not released": ("        release(ring, turn, C)\n", ""),
    "a place is released before it is read": (
        "        b_grad_v, b_grad_k = warpgroup_mma_wait(0, deps=[s_grad_v, s_grad_k])\n",
        "        b_grad_v, b_grad_k = warpgroup_mma_wait(1, deps=[s_grad_v, s_grad_k])\n",
    ),
    "another place is released": ("        release(ring, turn, C)\n", "        release(ring, turn + 1, C)\n"),
    "the producer waits for the other phase": (
        "mbarrier.wait(ring.empty.index(place), phase ^ 1)\n        full",
        "mbarrier.wait(ring.empty.index(place), phase)\n        full",
    ),
    "the groups wait for the other phase": (
        "mbarrier.wait(ring.full.index(place), phase)\n        q =",
        "mbarrier.wait(ring.full.index(place), phase ^ 1)\n        q =",
    ),
    "phases change with every tile": ("tile // STAGES % 2", "tile % 2"),
    "a place too few": ("return tile % STAGES,", "return tile % (STAGES - 1),"),
    "one group empties a place": (
        "mbarrier.init(full.index(place), count=2)\n        mbarrier.init(empty.index(place), count=GROUPS)",
        "mbarrier.init(full.index(place), count=2)\n        mbarrier.init(empty.index(place), count=1)",
    ),
    "the copies alone fill a place": (
        "mbarrier.init(full.index(place), count=2)",
        "mbarrier.init(full.index(place), count=1)",
    ),
    "nobody waits for a tile": ("        mbarrier.wait(ring.full.index(place), phase)\n        q =", "        q ="),
    "the producer does not wait": (
        "        mbarrier.wait(ring.empty.index(place), phase ^ 1)\n        full",
        "        full",
    ),
    "half the bytes": ("2 * C.BLOCK_M * C.HEAD_DIM * 2)", "C.BLOCK_M * C.HEAD_DIM * 2)"),
    "numbers before the place is empty": (
        "        place, phase = place_and_phase(turn, C.STAGES)\n        mbarrier.wait(ring.empty",
        "        place, phase = place_and_phase(turn, C.STAGES)\n        ring.lse.index(place).store(b_lse)\n"
        "        mbarrier.wait(ring.empty",
    ),
    "numbers after the arrival": (
        "        ring.sums.index(place).store(-b_sums)\n",
        "",
        "        mbarrier.arrive(full, count=1)\n",
        "        mbarrier.arrive(full, count=1)\n        ring.sums.index(place).store(-b_sums)\n",
    ),
    "numbers of another place": ("ring.lse.index(place).store(b_lse)", "ring.lse.index(0).store(b_lse)"),
    "a tile fewer is produced": (
        "for turn in range(C.GROUP * (tile.end - tile.begin)):\n        first",
        "for turn in range(C.GROUP * (tile.end - tile.begin) - 1):\n        first",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutation", BROKEN.values(), ids=BROKEN)
def test_the_search_finds(states, gluon_interleavings, mutation):
    pairs = tuple(zip(mutation[::2], mutation[1::2], strict=True))
    with pytest.raises((gluon_interleavings.Race, gluon_interleavings.Deadlock)):
        states(KEYS, call(300, 300, 300, 2), 2, mutations=pairs)


# Keys, cross keys, queries, options; the program, of which the last queries' is the first.
QUERY_CALLS = {
    "one tile each": (100, 30, 60, {}, 0),
    "many": (500, 300, 128, {}, 0),
    "self alone": (400, 0, 128, {}, 0),
    "first queries": (300, 200, 300, {}, 2),
    "nothing seen": (128, 0, 128, {"query_start": 0, "causal": False}, 0),
    "window": (600, 128, 128, {"window": 150}, 0),
}


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("keys, cross_keys, queries, options, program", QUERY_CALLS.values(), ids=QUERY_CALLS)
def test_no_race_and_no_deadlock_of_queries(states, keys, cross_keys, queries, options, program, stages):
    assert states(QUERIES, call(keys, cross_keys, queries, **options), stages, program) > 50


BROKEN_QUERIES = {
    "K is not released": ("        release(places.k, turn, C)\n", ""),
    "V is not released": ("        release(places.v, turn, C)\n", ""),
    "K is released before it is read": (
        "        b_grad_q = warpgroup_mma_wait(0, deps=[s_grad_q])\n",
        "        b_grad_q = warpgroup_mma_wait(1, deps=[s_grad_q])\n",
    ),
    "V is released before it is read": (
        "        b_products = warpgroup_mma_wait(0, deps=[s_products])\n        release(places.v, turn, C)\n",
        "        release(places.v, turn, C)\n        b_products = warpgroup_mma_wait(0, deps=[s_products])\n",
    ),
    "a turn is not counted": ("        turn += 1\n", ""),
    "the own tiles start anew": (
        "add_keys(group, b_grad_q, turn, own, ahead",
        "add_keys(group, b_grad_q, 0, own, ahead",
    ),
    "V of a tile too far": ("fill(v_ring, number, weighted, tile", "fill(v_ring, number + 1, weighted, tile"),
    "K in V's ring": (
        "fill(k_ring, number, keys, tile_number * C.BLOCK_N, C)\n\n",
        "fill(v_ring, number, keys, tile_number * C.BLOCK_N, C)\n\n",
    ),
    "the producer waits for the other phase": ("phase ^ 1", "phase"),
    "the groups wait for the other phase": ("ring.full.index(place), phase)", "ring.full.index(place), phase ^ 1)"),
    "one group empties a place": ("count=GROUPS", "count=1"),
    "nobody waits for a tile": ("    mbarrier.wait(ring.full.index(place), phase)\n", ""),
    "the producer does not wait": ("    mbarrier.wait(ring.empty.index(place), phase ^ 1)\n", ""),
    "half the bytes": ("C.BLOCK_N * C.HEAD_DIM * 2)", "C.BLOCK_N * C.HEAD_DIM)"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", BROKEN_QUERIES.values(), ids=BROKEN_QUERIES)
def test_the_search_finds_of_queries(states, gluon_interleavings, mutation):
    with pytest.raises((gluon_interleavings.Race, gluon_interleavings.Deadlock)):
        states(QUERIES, call(700, 300, 128), 2, mutations=(mutation,))


# What has no order, and shows when a program runs.
WRONG = {
    "no fence": (KEYS, "    fence_async_shared()\n    meet()", "    meet()"),
    "running scores are used": (
        KEYS,
        "warpgroup_mma_wait(1, deps=[s_scores])\n        b_weights, b_slope",
        "warpgroup_mma_wait(2, deps=[s_scores])\n        b_weights, b_slope",
    ),
    "running products are used": (KEYS, "warpgroup_mma_wait(1, deps=[s_products])", "warpgroup_mma_wait(2, deps=[s_products])"),
    "no fence of queries": (QUERIES, "    fence_async_shared()\n    meet()", "    meet()"),
    "running scores of queries": (
        QUERIES,
        "warpgroup_mma_wait(1, deps=[s_scores])\n        b_slope",
        "warpgroup_mma_wait(2, deps=[s_scores])\n        b_slope",
    ),
    "running products of queries": (
        QUERIES,
        "warpgroup_mma_wait(0, deps=[s_products])",
        "warpgroup_mma_wait(1, deps=[s_products])",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wanted, old, new", WRONG.values(), ids=WRONG)
def test_a_run_finds(states, gluon_on_cpu, wanted, old, new):
    with pytest.raises(gluon_on_cpu.Wrong):
        states(wanted, call(300, 300, 300, 2), 2, mutations=((old, new),), strict=True)
