"""The Hopper kernels compiled for sm_90 without a GPU: no spills, and in their loops the order of work that their speed rests on."""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton.experimental.gluon")

# CI compiles what has the fewest features and what has all, each of another width and dtype; --thorough the rest.
CALLS = [
    ("gluon", 128, "bfloat16"),
    pytest.param("gluon_spans", 64, "bfloat16", marks=pytest.mark.thorough),
    pytest.param("gluon_everything", 64, "float16", marks=pytest.mark.slow),
    pytest.param("gluon", 64, "bfloat16", marks=pytest.mark.thorough),
    pytest.param("gluon_spans", 128, "bfloat16", marks=pytest.mark.thorough),
    pytest.param("gluon_everything", 128, "bfloat16", marks=pytest.mark.thorough),
]


def compiled(variant, head_dim, dtype):
    """-> figures of each kernel of a call, `cubin` among them."""
    call = dict(arch="sm_90", variant=variant, head_dim=head_dim, dtype=dtype, length=1024, skip=[])
    call["module"] = "layalign.kernels.adaptive_fusion_attention.gluon.shipped_calls"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "layalign.kernels.ahead_of_time.worker", json.dumps(call)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    lines = map(json.loads, process.stdout.splitlines())
    return [line["figures"] for line in lines if line.get("figures")]


def instructions(cubin):
    """(address, instruction) of a kernel."""
    import triton

    dump = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-sass", cubin], capture_output=True, text=True, check=True
    )
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;", dump.stdout, re.MULTILINE)
    return [(int(address, 16), text) for address, text in found]


def tile_loops(code, products, groups):
    """The instructions of each loop that multiplies and groups its products as often as a tile asks for: one turn is a tile."""
    loops = []
    for address, text in code:
        target = re.search(r"\bBRA\S*\s+(?:!?U?P\w+,\s*)?(0x[0-9a-f]+)", text)
        if target and (begin := int(target[1], 16)) < address:
            body = [named(instruction) for at, instruction in code if begin <= at <= address]
            kinds = [text.split(".")[0] for text in body]
            if kinds.count("HGMMA") == products and kinds.count("WARPGROUP") == groups:
                loops.append((begin, address, body))
    # Shortest first: not what a loop is within, such as that in which idle warps wait for work, nor a wait's way back into it.
    apart = []
    for begin, end, body in sorted(loops, key=lambda loop: loop[1] - loop[0]):
        if all(end < other_begin or other_end < begin for other_begin, other_end, _ in apart):
            apart.append((begin, end, body))
    return [body for _, _, body in apart]


def named(text):
    """An instruction without its predicate."""
    return re.sub(r"^@!?U?P\w+\s+", "", text)


@pytest.mark.parametrize("variant, head_dim, dtype", CALLS)
def test_no_spills_and_softmax_while_the_tensor_cores_work(variant, head_dim, dtype):
    kernels = compiled(variant, head_dim, dtype)
    assert len(kernels) == (1 if variant == "gluon_everything" else 2)
    for figures in kernels:
        assert figures["spill_bytes"] == figures["stack_bytes"] == 0
        assert figures["shared_bytes"] <= 227 * 1024
        assert figures["tensor_core_kind"] == "HGMMA"
        loops = tile_loops(instructions(figures["cubin"]), head_dim // 16 + 8, 4)
        # Of either group: whole tiles of cross keys, and then of own keys, and those along the band; with spans cross keys in part,
        # with a window a second band.
        assert len(loops) == 2 * {"gluon": 3, "gluon_spans": 4, "gluon_everything": 5}[variant]
        for body in loops:
            _check_loop(body)


def _check_loop(body):
    products = [place for place, text in enumerate(body) if text.startswith("HGMMA")]
    waits = [place for place, text in enumerate(body) if text.startswith("WARPGROUP.DEPBAR")]
    exponentials = [place for place, text in enumerate(body) if text.startswith("MUFU.EX2")]
    assert all(int(re.match(r"HGMMA\.64x(\d+)x16", body[place])[1]) >= 64 for place in products)
    # Scores are waited for, then P V: between the two the softmax, which needs the scores alone.
    assert len(waits) == 2 and products[-1] < waits[0]
    between = sum(waits[0] < place < waits[1] for place in exponentials)
    assert between >= 0.9 * len(exponentials) >= 50, f"{between} of {len(exponentials)} exponentials while P V runs"
    # Warps of one group meet, never all of the program.
    assert all(re.search(r", 0x80$", text) for text in body if text.startswith("BAR.SYNC"))
    # No register that the running products read or sum in is written.
    running = set()
    for place in products:
        width, total, left = re.match(r"HGMMA\.64x(\d+)\S+ R(\d+), (?:R(\d+), )?", body[place]).groups()
        if left is not None:
            running |= {*range(int(left), int(left) + 4), *range(int(total), int(total) + int(width) // 2)}
    written = {
        int(found[1]) for text in body[products[-1] + 1 : waits[1]] if (found := re.match(r"[A-Z]\S* R(\d+),", text))
    }
    assert running and not running & written


GRADIENTS = [
    ("gluon_gradients", 128, "bfloat16"),
    pytest.param("gluon_gradients_spans", 64, "bfloat16", marks=pytest.mark.thorough),
    pytest.param("gluon_gradients_everything", 64, "float16", marks=pytest.mark.slow),
    pytest.param("gluon_gradients", 64, "bfloat16", marks=pytest.mark.thorough),
    pytest.param("gluon_gradients_spans", 128, "bfloat16", marks=pytest.mark.thorough),
    pytest.param("gluon_gradients_everything", 128, "bfloat16", marks=pytest.mark.thorough),
]


@pytest.mark.parametrize("variant, head_dim, dtype", GRADIENTS)
def test_gradients_do_not_spill_and_their_products_overlap(variant, head_dim, dtype):
    of_keys, of_queries = compiled(variant, head_dim, dtype)
    for figures in (of_keys, of_queries):
        assert figures["spill_bytes"] == figures["stack_bytes"] == 0
        assert figures["shared_bytes"] <= 227 * 1024
    # Scores, products with the output's gradient, and sums over 64 queries for values and for keys. Scores are waited for while the
    # products run, and these while the values' sum does.
    both, steps = 2 * (head_dim // 16), 64 // 16
    loops = tile_loops(instructions(of_keys["cubin"]), both + 2 * steps, 7)
    assert len(loops) == 2
    for body in loops:
        _check_waits(body, [(both, "0x1"), (both + steps, "0x1"), (both + 2 * steps, "0x0")])
    # The same over 128 keys for queries, of cross keys and of own ones.
    steps = 128 // 16
    loops = tile_loops(instructions(of_queries["cubin"]), both + steps, 6)
    assert len(loops) == 4
    for body in loops:
        _check_waits(body, [(both, "0x1"), (both, "0x0"), (both + steps, "0x0")])


def _check_waits(body, wanted):
    """wanted: of each wait for products, how many were started before, and how many groups of them may still run."""
    products = [place for place, text in enumerate(body) if text.startswith("HGMMA")]
    waits = [place for place, text in enumerate(body) if text.startswith("WARPGROUP.DEPBAR")]
    assert [(sum(place < wait for place in products), body[wait].split()[-1]) for wait in waits] == wanted
    assert all(int(re.match(r"HGMMA\.64x(\d+)x16", body[place])[1]) >= 64 for place in products)
    # Warps of one group meet, never all of the program.
    assert all(re.search(r", 0x80$", text) for text in body if text.startswith("BAR.SYNC"))
