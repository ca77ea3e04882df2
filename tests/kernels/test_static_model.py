"""The static model of time: machine code read, loops found, a scheduler's cycles, gates, and what is called a prediction."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from layalign.kernels.adaptive_fusion_attention.gpu import order
from layalign.kernels.ahead_of_time import candidates, gates, predict, report
from layalign.kernels.ahead_of_time.gpus import A100, GPUS, H100, H200, resident_blocks
from layalign.kernels.ahead_of_time.prefetch import loop_loads
from layalign.kernels.ahead_of_time.sass import Program, instructions
from layalign.kernels.ahead_of_time.timing import loop_time, product_bytes, product_cycles, straight_time
from layalign.kernels.ahead_of_time.work import Launch, Work, work
from layalign.kernels.launch import LaunchConfig

# One turn of matmul_kernel (128 x 256 x 64, 8 warps, 4 stages, sm_90), and where it waits when a tile is late.
MATMUL = (Path(__file__).parent / "matmul_loop.sass").read_text()


def code(*lines):
    """Machine code of (text, stall, counter raised, counters awaited), shorter ones filled with (1, None, ())."""
    words = []
    for place, line in enumerate(lines):
        text, stall, raised, waited = (
            (*line, *(1, None, ())[len(line) - 1 :]) if isinstance(line, tuple) else (line, 1, None, ())
        )
        control = (
            stall | (7 if raised is None else raised) << 5 | 7 << 8 | sum(1 << counter for counter in waited) << 11
        )
        words.append(
            f"        /*{place * 16:04x}*/  {text} ;  /* 0x{0:016x} */\n            /* 0x{control << 41:016x} */\n"
        )
    return "".join(words)


def turn_of(*lines):
    return instructions(code(*lines))


def test_instructions_carry_their_timing():
    found = instructions(MATMUL)
    products = [x for x in found if x.kind == "HGMMA"]
    assert [x.name for x in products] == ["HGMMA.64x256x16.F32.BF16"] * 4 and found[0].address == 0x2450
    copy = next(x for x in found if x.kind == "UTMALDG")
    assert (copy.guard, copy.stall, copy.reads, copy.raises) == ("@UP0", 2, 1, None)
    asking = next(x for x in found if x.kind == "SYNCS")
    assert (asking.raises, asking.waits, asking.stall) == (1, (1,), 2)
    branch = next(x for x in found if x.kind == "BRA")
    assert (branch.guard, branch.target) == ("@!P4", 0x3C90)


def test_a_loop_and_the_way_through_it():
    program = Program(instructions(MATMUL))
    (loop,) = program.innermost()
    turn = program.turn(loop, False)
    assert turn[0].address == 0x2460 and turn[-1].address == 0x2960 and len(turn) == 81
    assert len(program.spins) == 1 and program.turn(loop, True) == turn  # not through the wait for a late tile


def test_short_and_long_turns_and_what_surrounds_them():
    lines = ["MOV R0, R1", "FADD R0, R0, R1", "@P0 BRA 0x50", "FMUL R0, R0, R1", "FMUL R0, R0, R1", "FADD R2, R2, R3"]
    program = Program(instructions(code(*lines, "@P1 BRA 0x10", "EXIT")))
    (loop,) = program.innermost()
    assert [x.address for x in program.turn(loop, False)] == [0x10, 0x20, 0x50, 0x60]
    assert [x.address for x in program.turn(loop, True)] == [0x10, 0x20, 0x30, 0x40, 0x50, 0x60]
    assert [x.kind for x in program.rest([loop])] == ["MOV", "EXIT"]


def test_figures_of_a_loop():
    figures = predict.code_of(MATMUL, "").loops[0]
    assert (figures.instructions, figures.products, figures.product_n, figures.waits) == (81, 4, 256, 1)
    assert (figures.block_barriers, figures.warp_syncs, figures.copy_waits, figures.fences) == (4, 1, 1, 0)
    assert figures.shared_rate == (64 + 256) * 32 / 128 == 80  # both sides from shared memory, N / 2 cycles


@pytest.mark.parametrize(
    "text, moved, cycles",
    [
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR24], R24", 6144, 64),
        ("HGMMA.64x128x16.F32.BF16 R88, R180, gdesc[UR24].tnspB, R88", 4096, 64),
        ("HGMMA.64x32x16.F32.BF16 R24, gdesc[UR24], R24", 3072, 24),  # 16 by the tensor core: shared memory is slower
        ("HMMA.16816.F32.BF16 R4, R4, R8, R12", 0, 4096 / (1024 * 0.63)),
    ],
)
def test_products(text, moved, cycles):
    (x,) = turn_of(text)
    assert product_bytes(x) == moved and product_cycles(x, H100, H100.shared_rate) == pytest.approx(cycles)


def test_pipes_limit_a_loop():
    def cycles(*lines, warps=4, blocks=1):
        return loop_time(turn_of(*lines), H100, warps=warps, blocks=blocks).cycles

    assert cycles(*["FFMA R0, R0, R1, R2"] * 32) == 32  # one instruction a cycle and scheduler
    assert cycles(*["FFMA R0, R0, R1, R2"] * 32, warps=16) == 128
    assert cycles(*["FMNMX R0, R0, R1"] * 32) == 64  # 16 lanes
    assert cycles(*["MUFU.EX2 R0, R1"] * 32) == 256  # 4 lanes
    assert cycles(*[("FFMA R0, R0, R1, R2", 4)] * 32) == 128  # each needs the one before
    assert cycles(*[("FFMA R0, R0, R1, R2", 4)] * 32, warps=16) == 128  # which other warps hide
    assert cycles(*["FFMA R0, R0, R1, R2"] * 32, blocks=3) == 96


def test_waiting_for_a_counter_costs_the_latency():
    waits = [("MUFU.EX2 R0, R1", 1, 0), ("FADD R2, R2, R0", 1, None, (0,))]
    assert loop_time(turn_of(*waits), H100, warps=4).cycles == pytest.approx(H100.function_latency + 1, abs=1)


SOFTMAX = [*["MUFU.EX2 R0, R1"] * 64]
PRODUCT = [
    *["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR24], R24"] * 7,
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR24], R24, gsb0",
]
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def test_two_warp_groups_overlap_until_a_barrier_locks_them_together():
    alone = loop_time(turn_of(*PRODUCT, WAIT, *SOFTMAX), H100, warps=4).cycles
    free = loop_time(turn_of(*PRODUCT, WAIT, *SOFTMAX), H100, warps=8)
    locked = loop_time(turn_of("BAR.SYNC.DEFER_BLOCKING 0x0", *PRODUCT, WAIT, *SOFTMAX), H100, warps=8)
    own = loop_time(turn_of("BAR.SYNC.DEFER_BLOCKING 0x1, 0x80", *PRODUCT, WAIT, *SOFTMAX), H100, warps=8)
    # A product takes 512 cycles, 64 functions 512: a group alone needs both, two in turns keep both pipes busy.
    assert alone == pytest.approx(1024, rel=0.06) and free.cycles == pytest.approx(1024, rel=0.12)
    assert locked.cycles > 1.4 * free.cycles and own.cycles == pytest.approx(free.cycles, rel=0.15)
    assert free.limit.split()[0] in ("tensor", "mufu") and locked.busy["tensor"] == 1024


def test_products_left_under_way_overlap_with_what_follows():
    waited, left = (
        loop_time(turn_of(*PRODUCT, f"WARPGROUP.DEPBAR.LE gsb0, {pending:#x}", *SOFTMAX), H100, warps=4).cycles
        for pending in (0, 1)
    )
    assert left < waited - 100


def test_a_tile_asked_for_earlier_is_waited_for_less():
    turn = ["SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR30], R15", *PRODUCT, WAIT, "@UP1 UTMALDG.2D [UR12], [UR28]"]
    late, early = (
        loop_time(turn_of(*turn), H100, warps=4, distance=distance, bulk_bytes=[16384]).cycles for distance in (1, 3)
    )
    transfer = 16384 / H100.fill_rate
    assert late - early == pytest.approx(H100.cache_latency + H100.bulk_latency + transfer, rel=0.1)
    assert early == pytest.approx(512 + H100.tensor_latency, rel=0.1)


def test_asynchronous_copies_are_waited_for_by_groups():
    copies = [("LDGSTS.E.BYPASS.128 [R1], desc[UR30][R2.64]", 1), ("LDGDEPBAR", 1, 0)]

    def cycles(pending):
        return loop_time(turn_of(*copies, f"DEPBAR.LE SB0, {pending:#x}", "FADD R0, R0, R1"), H100, warps=4).cycles

    assert cycles(0) > H100.cache_latency and cycles(4) < cycles(0) / 3


def test_the_rest_of_a_kernel_waits_for_its_loads():
    load = turn_of(("LDG.E R0, desc[UR4][R2.64]", 1, 0), ("FADD R0, R0, R1", 4, None, (0,)))
    assert straight_time(load, H100, warps=4) > H100.cache_latency and straight_time([], H100, warps=4) == 0


DIALECT = """
    %0 = ttg.async_copy_global_to_local %p, %b : tensor<32x128x!tt.ptr<bf16>, #blocked> -> <32x128xbf16, #shared, #smem, mutable>
    %1 = ttg.async_copy_global_to_local %p, %b : tensor<32x128x!tt.ptr<bf16>, #blocked> -> <32x128xbf16, #shared, #smem, mutable>
    %2:3 = scf.for %i = %c0 to %end step %c1 iter_args(%a = %x) -> (tensor<64x64xf32, #mma>)  : i32 {
      %3 = ttg.async_wait %a {num = 1 : i32}
      %m = tt.load %q, %r : tensor<64x!tt.ptr<i8>, #slice>
      %4 = ttng.warp_group_dot %5, %6, %7 {isAsync = true} : !ttg.memdesc<64x64xbf16> -> tensor<64x64xf32, #mma>
      %8 = ttg.async_copy_global_to_local %p, %b : tensor<32x128x!tt.ptr<bf16>, #blocked> -> <32x128xbf16, #shared, #smem, mutable>
      scf.yield %4 : tensor<64x64xf32, #mma>
    } loc(#loc)
    scf.for %i = %c0 to %end step %c1 : i32 {
      %9 = tt.load %q : tensor<64x!tt.ptr<i8>, #slice>
    } loc(#loc)
"""


def test_prefetch_from_the_dialect():
    (loop,) = loop_loads(DIALECT)
    assert (loop.copies, loop.ahead, loop.pending, loop.unpipelined, loop.products) == (1, 2, 1, 1, 1)


def test_resident_blocks():
    assert resident_blocks(H100, 168, 100_000, 4) == 2 and resident_blocks(H100, 168, 150_000, 4) == 1
    assert resident_blocks(H100, 255, 1000, 8) == 1 and resident_blocks(A100, 64, 1000, 4) == 8
    assert resident_blocks(H100, 32, 0, 1) == 32 and resident_blocks(H100, 255, 300_000, 8) == 0


def test_programs_over_multiprocessors():
    assert predict.makespan([3, 3, 3, 3], 4) == 3 and predict.makespan([3, 3, 3, 3, 3], 4) == 6
    assert predict.makespan([1, 1, 1, 8], 2) == 9 and predict.makespan([8, 1, 1, 1], 2) == 8  # the longest first
    assert predict.makespan([], 4) == 0


CONSTANTS = dict(
    HEADS=4, GROUP=2, HEAD_DIM=64, BLOCK_D=64, CAUSAL=True, WINDOWED=False, CROSS=True, BLOCK_M=64, BLOCK_N=32
)
NUMBERS = dict(sequences=0, queries=256, keys=256, cross_keys=100, start=0, window=0)


def test_turns_of_attention_count_every_pair_of_tiles_once():
    tensors = {"outputs.out": 2, "outputs.cross_out": 2}
    forward = work("forward_kernel", Launch((4 * 4 * 2,), NUMBERS, tensors, CONSTANTS, 2))
    assert len(forward.programs) == 32
    assert (
        forward.programs[:8] == [((3, 1), (6, 2))] * 8 and forward.programs[24:] == [((3, 1), (0, 2))] * 8
    )  # last queries first
    pairs = 2 * 4 * (256 * 257 // 2 + 256 * 100)
    assert forward.flops == 4 * 64 * pairs
    out, keys = 2 * 4 * 256 * 64 * 2, 2 * 2 * 2 * 356 * 64 * 2
    assert forward.least == 2 * out + keys and forward.moved == forward.least + out

    grid = ((8 + 4) * 2 * 2,)
    gradients = work("key_value_gradients_kernel", Launch(grid, NUMBERS, {}, CONSTANTS, 2))
    assert len(gradients.programs) == grid[0] and gradients.programs[:16] == [((8, 0), (0, 0))] * 16
    assert gradients.programs[16:20] == [((0, 0), (6, 2))] * 4 and gradients.programs[44:] == [((0, 0), (0, 2))] * 4
    own = sum(sum(turns[1]) for turns in gradients.programs)
    assert own == sum(sum(turns[1]) for turns in forward.programs)


@pytest.mark.parametrize("keys, cross_keys, batch", [(256, 100, 3), (40_000, 20_000, 3), (200_000, 0, 5)])
def test_programs_start_in_the_order_of_the_kernels(keys, cross_keys, batch, monkeypatch):
    tiles, heads = 4, CONSTANTS["HEADS"] * batch
    functions = dict(num_programs=lambda axis: tiles * heads, maximum=max, minimum=min)
    monkeypatch.setattr(order, "tl", SimpleNamespace(**functions))
    monkeypatch.setattr(order, "_SECTION", order._SECTION.value)
    block = SimpleNamespace(BLOCK_D=CONSTANTS["BLOCK_D"])
    places = [
        order.head_and_tile.fn(program, tiles, keys + cross_keys, CONSTANTS["GROUP"], block)
        for program in range(tiles * heads)
    ]
    numbers = NUMBERS | dict(keys=keys, cross_keys=cross_keys, start=keys - 256)
    constants = CONSTANTS | dict(CROSS=cross_keys > 0)
    programs = work("forward_kernel", Launch((tiles * heads,), numbers, {}, constants, 2)).programs
    longest_first = sorted(set(programs), key=lambda turns: -sum(map(sum, turns)))
    assert len(longest_first) == tiles and programs == [longest_first[tile] for _, tile in places]
    assert sorted(places) == [(head, tile) for head in range(heads) for tile in range(tiles)]


def test_gradients_of_states_are_written_along():
    numbers = dict(X=1024, J=64, tiles=16, tiles_each=4)
    constants = dict(LAYERS=24, BLOCK_M=64)
    alone = work("mix_weight_gradients_kernel", Launch((1, 4), numbers, {}, constants, 2))
    along = [
        work("mix_weight_gradients_kernel", Launch((1, 4), numbers, {"grad_states": size}, constants, 2))
        for size in (2, 4)
    ]
    assert alone.least == 1024 * (24 + 64) * 2 and alone.programs == [((4, 0),)] * 4
    assert [x.least - alone.least for x in along] == [1024 * 24 * 2, 1024 * 24 * 4]
    assert [x.flops / alone.flops for x in along] == [1.5, 1.5]
    states = work("mix_state_gradients_kernel", Launch((4,), numbers, {"grad_states": 4}, constants, 2))
    assert states.least == along[1].least and states.flops == alone.flops


def test_groups_of_warps_go_through_the_loops_on_their_own():
    numbers = NUMBERS | dict(queries=512, keys=512, cross_keys=300, start=0)
    constants = CONSTANTS | dict(BLOCK_M=128, BLOCK_N=128, EVEN_CROSS=False)
    doing = work("hopper_forward_kernel", Launch((4 * 4 * 3,), numbers, {}, constants, 2))
    first, last = doing.programs[0], doing.programs[-1]  # the last queries of all heads come first
    assert first == ((1, 0), (1, 0), (2, 0), (1, 0)) and last == (
        (1, 0),
        (1, 0),
        (0, 0),
        (0, 0),
    )  # and a tile before each
    assert doing.groups == 2 and doing.copied == 2 * 128 * 64 * 2 and doing.programs[:12] == [first] * 12
    even = work(
        "hopper_forward_kernel", Launch((48,), numbers | dict(cross_keys=256), {}, constants | dict(EVEN_CROSS=True), 2)
    )
    assert even.programs[0] == ((1, 0), (2, 0), (1, 0))

    def cycles(*turn, **fields):
        read = predict.code_of(code("MOV R0, R1", *turn, "@P1 BRA 0x10", "EXIT"), "")
        alone = Work([((64, 0),)] * 132, None, 1e9, 0, 0)
        found = predict.predicted(read, dataclasses.replace(alone, **fields), H100, 168, 150_000, 4)
        assert found.blocks == 1
        return found.turn_cycles[0]

    assert cycles(*PRODUCT, WAIT) == pytest.approx(512, rel=0.1)
    assert cycles(*PRODUCT, WAIT, groups=2) == pytest.approx(1024, rel=0.1)  # they share the tensor cores
    softmax = cycles(*PRODUCT, WAIT, *SOFTMAX, groups=2)
    assert softmax == pytest.approx(1024, rel=0.15)  # one's softmax while the other one multiplies
    assert cycles(*PRODUCT, WAIT, groups=2, copied=100_000) == pytest.approx(100_000 / H100.fill_rate)


def test_turns_of_products_and_decoding():
    sizes = dict(M=256, N=512, K=1024, groups=3)
    blocks = dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64)
    products = work("matmul_kernel", Launch((8,), sizes, {}, blocks, 2))
    assert sum(products.tiles) == 12 and products.programs[0] == ((32, 0),) and products.programs[7] == ((16, 0),)
    assert products.flops == 2 * 3 * 256 * 512 * 1024
    decode = CONSTANTS | dict(BLOCK_M=16, CROSS=True)
    numbers = NUMBERS | dict(queries=1)
    (whole, *_) = work("decode_kernel", Launch((4, 1), numbers, {}, decode, 2)).programs
    assert whole == ((4, 0), (8, 0))
    split = work("decode_kernel", Launch((4, 3), numbers, {}, decode, 2))
    assert [split.programs[place] for place in (0, 4, 8)] == [((4, 0), (0, 0)), ((0, 0), (4, 0)), ((0, 0), (4, 0))]
    assert work("list_used_tiles_kernel", Launch((1,), {}, {}, {}, 2)) is None


def test_a_prediction_is_no_faster_than_its_floors():
    read = predict.code_of(MATMUL, "")
    doing = Work([((64, 0),)] * 264, [1] * 264, 1e9, 0, 0)
    found = predict.predicted(read, doing, H100, 168, 200_000, 8)
    assert (
        found.blocks == 1
        and found.seconds > doing.flops / (H100.flops * 132 * H100.clock)
        and 0 < found.tensor_busy < 1
    )
    by_memory = predict.predicted(read, dataclasses.replace(doing, moved=3e9, least=1e9), H100, 168, 200_000, 8)
    assert by_memory.limit == "memory" and by_memory.seconds == pytest.approx(1e-3 + H100.launch)
    assert by_memory.floor == pytest.approx(1 / 3e3)
    tall = predict.predicted(
        read, dataclasses.replace(doing, programs=[((64, 0),)] * 265, tiles=[1] * 265), H100, 168, 200_000, 8
    )
    assert tall.seconds > found.seconds * 1.3  # a third wave for one program
    with pytest.raises(ValueError, match="1 hot loops in the code where the work has 2"):
        predict.predicted(read, dataclasses.replace(doing, programs=[((1, 0), (1, 0))]), H100, 168, 200_000, 8)


LOOP = dict(product_n=128, block_barriers=2, unpipelined=0)
LINE = dict(kernel="other_kernel", arch="sm_90", variant="causal", head_dim=128, dtype="bfloat16", error=None)


@pytest.mark.parametrize(
    "loop, said",
    [
        ({}, []),
        ({"product_n": 32}, ["loop 0: HGMMA of N = 32, at least 64 wanted"]),
        ({"product_n": None}, []),
        ({"block_barriers": 9}, ["loop 0: 9 barriers of the block a turn, 5 allowed"]),
        ({"unpipelined": 1}, ["loop 0: 1 loads that the turn waits for, 0 allowed"]),
    ],
)
def test_gates_of_loops(loop, said):
    assert gates.loop_failures(LINE | {"loops": [LOOP | loop]}) == said
    line = dict(spill_bytes=0, shared_bytes=0, tensor_memory_columns=0, matrix_products=0)
    assert report.failures(LINE | line | {"loops": [LOOP | loop]}) == said and report.failures(LINE | line) == []


def test_an_allowance_is_for_its_kernels_only(monkeypatch):
    allowance = gates.Allowance("other_kernel", "why", {"variant": ("packed", "padded")}, least_n=32)
    monkeypatch.setattr(gates, "ALLOWANCES", (allowance,))
    narrow = {"loops": [LOOP | {"product_n": 32}]}
    assert gates.loop_failures(LINE | narrow) and not gates.loop_failures(LINE | narrow | {"variant": "packed"})
    assert gates.loop_failures(LINE | narrow | {"variant": "packed", "kernel": "forward_kernel"})
    assert gates.loop_failures(LINE | {"variant": "packed", "loops": [LOOP | {"product_n": 16}]})


def test_every_allowance_says_why():
    assert all(len(allowance.reason) > 10 for allowance in gates.ALLOWANCES)


def test_the_table_calls_predictions_what_they_are():
    common = dict(
        operator="toy", length=64, config={"block_m": 64, "warps": 4, "stages": 2}, registers=100, spill_bytes=0
    )
    common |= dict(
        stack_bytes=0, shared_bytes=100, tensor_core_instructions=4, tensor_core_kind="HGMMA", seconds=1, failures=[]
    )
    figures = predict.code_of(MATMUL, "").loops
    doing = Work([((64, 0),)], [1], 1e9, 0, 0)
    found = dataclasses.asdict(predict.predicted(predict.code_of(MATMUL, ""), doing, H200, 168, 200_000, 8))
    line = LINE | common | dict(model="h200", loops=[dataclasses.asdict(x) for x in figures], predicted=found)
    plain, modelled = report.table([LINE | common]), report.table([line])
    assert "predicted" not in plain and "floor" not in plain
    assert modelled.splitlines()[0].count("predicted") == 3 and " 256 " in modelled.splitlines()[1]
    assert set(GPUS) == {"h100", "h200", "a100"}


def test_a_gpu_is_known_and_of_the_architecture_asked_for():
    assert report.modelled_gpu(None) is None and report.modelled_gpu("a100", ["sm_80"]) is A100
    with pytest.raises(ValueError, match="model: got b300, takes one of h100, h200, a100"):
        report.modelled_gpu("b300")
    with pytest.raises(ValueError, match="arch: got sm_80, takes sm_90 with --model h100"):
        report.modelled_gpu("h100", ["sm_80"])


def test_words_of_candidates():
    wide = LaunchConfig(block_m=128, block_n=64, warps=8, stages=3, descriptors=True)
    assert candidates.config("128x64x8x3xd") == wide
    assert candidates.config("128x256x8x4xk64xd") == LaunchConfig(
        block_m=128, block_n=256, warps=8, stages=4, descriptors=True, block_k=64
    )
    with pytest.raises(ValueError, match="configuration: got 128x64, takes rows"):
        candidates.config("128x64")
    sizes = candidates.sizes(["B4", "H32/8", "S512", "T256", "forward"])
    assert sizes == dict(batch=4, heads=32, kv_heads=8, queries=512, keys=512, cross=256, trained=False)
