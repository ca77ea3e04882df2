"""What the static model of time predicts for kernels of others whose times on an H100 are public: its calibration.

    python -m bench calibration --attention triton_fused_attention.py --product persistent_matmul.py

The two files are tritonbench's (github.com/meta-pytorch/tritonbench, below tritonbench/kernels and tritonbench/operators/gemm): Triton's
tutorials 06 and 09 with what the benchmarks need. Nothing of them is kept here: only what the compiled loops are to the model, for each
instruction its kind, stalls and counters, in bench/results/calibration.json. Predictions are computed from that anew wherever they are
needed (`predictions`), so that a change of the model shows.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from layalign.kernels.ahead_of_time.gpus import H100
from layalign.kernels.ahead_of_time.predict import Code, Hot, predicted, read_code
from layalign.kernels.ahead_of_time.prefetch import LoopLoads
from layalign.kernels.ahead_of_time.sass import Instruction
from layalign.kernels.ahead_of_time.timing import reduced
from layalign.kernels.ahead_of_time.work import Work

KEPT = Path(__file__).parent / "results" / "calibration.json"
TOLERANCE = 0.25

# Published TFLOP/s on an H100 SXM, fp16 or bf16, D = 128. {kernel: (source, {sizes: figure})}; sizes of attention: batch, heads, tokens,
# without a mask; of a product: M, N, K.
PUBLISHED: dict[str, tuple[str, dict[tuple[int, int, int], float]]] = {
    "attention, pointers": (
        "github.com/pytorch/benchmark/pull/2391",
        {
            (32, 16, 512): 329,
            (16, 16, 1024): 390,
            (8, 16, 2048): 434,
            (4, 16, 4096): 458,
            (2, 16, 8192): 471,
            (1, 16, 16384): 477,
        },
    ),
    "attention, descriptors": (
        "github.com/facebookexperimental/triton/pull/206",
        {
            (4, 32, 1024): 406.8,
            (4, 32, 2048): 427.8,
            (4, 32, 4096): 459.6,
            (4, 32, 8192): 464.4,
            (4, 32, 16384): 487.0,
        },
    ),
    "product, descriptors, persistent": (
        "github.com/meta-pytorch/tritonbench/pull/894",
        {(8192, 8192, 4096): 665.9, (8192, 8192, 8192): 673.6, (8192, 8192, 16384): 688.7},
    ),
}
_ATTENTION = dict(block_m=128, block_n=128, warps=8, stages=3)
_PRODUCT = dict(block_m=128, block_n=256, block_k=64, warps=8, stages=3)
CONFIGS = {name: _PRODUCT if name.startswith("product") else _ATTENTION for name in PUBLISHED}


def work(name: str, sizes: tuple[int, int, int]) -> Work:
    """What a launch of a published kernel does. The product's turns are those of one loop over all its tiles; the last of a tile is a
    long one, which writes it."""
    config = CONFIGS[name]
    if name.startswith("product"):
        m, n, k = sizes
        tiles, turns = -(-m // config["block_m"]) * -(-n // config["block_n"]), -(-k // config["block_k"])
        each = [tiles // H100.multiprocessors + (p < tiles % H100.multiprocessors) for p in range(H100.multiprocessors)]
        moved = 2 * (m * k + n * k + m * n)
        return Work([((count * (turns - 1), count),) for count in each], None, 2 * m * n * k, moved, moved)
    batch, heads, tokens = sizes
    programs = [((tokens // config["block_n"], 0),)] * (batch * heads * -(-tokens // config["block_m"]))
    moved = 4 * batch * heads * tokens * 128 * 2
    return Work(programs, None, 4 * batch * heads * 128 * tokens**2, moved, moved)


def encoded(code: Code, resources: dict[str, Any]) -> dict[str, Any]:
    """Numbers and names of instructions that a Code with one hot loop is to the model of time. resources: of the launch."""
    names: dict[str, int] = {}

    def numbers(turn: Sequence[Instruction]) -> list[list[int]]:
        found = []
        for x in map(reduced, turn):
            place = names.setdefault(" ".join((x.guard, x.name, x.operands)), len(names))
            counters = [-1 if counter is None else counter for counter in (x.raises, x.reads)]
            found.append([place, x.stall, *counters, sum(1 << counter for counter in x.waits)])
        return found

    (hot,) = code.hot
    short, rest = numbers(hot.short), numbers(code.rest)
    long = None if hot.long == hot.short else numbers(hot.long)
    loads = {"ahead": hot.loads.ahead, "bulk_bytes": hot.loads.bulk_bytes}
    return resources | {"names": list(names), **loads, "short": short, "long": long, "rest": rest}


def decoded(kept: dict[str, Any]) -> Code:
    """The Code of what `encoded` gave."""

    def turn(numbers: list[list[int]]) -> list[Instruction]:
        found = []
        for place, stall, raises, reads, waits in numbers:
            guard, name, operands = kept["names"][place].split(" ", 2)
            raised, held = (None if counter < 0 else counter for counter in (raises, reads))
            awaited = tuple(counter for counter in range(6) if waits >> counter & 1)
            found.append(Instruction(0, guard, name, operands, stall, raised, held, awaited))
        return found

    short = turn(kept["short"])
    long = short if kept["long"] is None else turn(kept["long"])
    hot = Hot(None, short, long, LoopLoads(ahead=kept["ahead"], bulk_bytes=kept["bulk_bytes"]), None)
    return Code([hot], turn(kept["rest"]), [])


def predictions(path: Path = KEPT) -> dict[tuple[str, tuple[int, int, int]], float]:
    """{(kernel, sizes): TFLOP/s} as the model has it now for the kept loops."""
    kept = json.loads(path.read_text())["kernels"]
    found = {}
    for name, (_, figures) in PUBLISHED.items():
        code, resources = decoded(kept[name]), [kept[name][x] for x in ("registers", "shared_bytes", "warps")]
        for sizes in figures:
            doing = work(name, sizes)
            found[name, sizes] = doing.flops / predicted(code, doing, H100, *resources).seconds / 1e12
    return found


def table(path: Path = KEPT) -> str:
    """Markdown: each published figure beside its prediction."""
    rows = [
        "| kernel | sizes | published TFLOP/s | predicted TFLOP/s | predicted / published |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for (name, sizes), value in predictions(path).items():
        public = PUBLISHED[name][1][sizes]
        rows.append(f"| {name} | {' x '.join(map(str, sizes))} | {public:.0f} | {value:.0f} | {value / public:.2f} |")
    return "\n".join(rows)


def write(attention: Path, product: Path, path: Path = KEPT) -> Path:
    """Compile the three kernels for sm_90 from their files and keep their loops."""
    import triton

    from layalign.kernels.ahead_of_time.worker import AbsentGPU, inspect

    triton.runtime.driver.set_active(AbsentGPU("sm_90"))
    kernels = {}
    with tempfile.TemporaryDirectory() as folder:
        modules = _attention_module(attention, Path(folder)), _product_module(product, Path(folder))
        for name in PUBLISHED:
            compiled = _compiled(name, *modules)
            files = [str(file) for file in compiled.metadata_group.values() if str(file).endswith(".cubin")]
            figures = inspect(compiled)
            resources = {"warps": CONFIGS[name]["warps"], **{x: figures[x] for x in ("registers", "shared_bytes")}}
            kernels[name] = encoded(read_code(files[0]), resources)
    about = f"meta-pytorch/tritonbench, compiled by Triton {triton.__version__} for sm_90; [name, stall, raises, reads, waits]"
    lines = [f"{json.dumps(name)}: {json.dumps(kernel, separators=(',', ':'))}" for name, kernel in kernels.items()]
    text = ",\n".join(lines)
    path.write_text(f'{{"source": {json.dumps(about)},\n"kernels": {{\n{text}\n}}}}\n')
    return path


def _loaded(name: str, text: str, folder: Path) -> ModuleType:
    """The module of that text: of a file, since Triton reads a kernel's source from there."""
    path = folder / f"{name}.py"
    path.write_text(text)
    specification = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(specification)  # type: ignore[arg-type]
    sys.modules[name] = module
    specification.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def _attention_module(path: Path, folder: Path) -> ModuleType:
    """The attention kernels without the package around them, whose names say what a Triton is able to."""
    text = path.read_text().replace("from ..utils.triton_utils import AsyncTaskContext", "")
    able = ("HAS_EXPLICIT_WS", "HAS_TMA_DESC", "PEEL_LAST", "WITH_COMPPIPE", "WITH_TMA", "TmaAutoTuneHelper")
    stubs = "\n".join([*(f"{name} = False" for name in able), "HAS_NEW_TMA = True"])
    text = re.sub(r"from \.attention_utils import \(.*?\)", stubs, text, flags=re.DOTALL)
    return _loaded("calibration_attention", text, folder)


def _product_module(path: Path, folder: Path) -> ModuleType:
    """The persistent product alone, with descriptors as Triton has had them since 3.3, and bf16."""
    text = path.read_text()
    begin = text.index("@triton.jit(launch_metadata=_matmul_launch_metadata)\ndef matmul_kernel_tma_persistent(")
    text = text[begin : text.index("def matmul_tma_persistent(a, b):")].replace(
        "(launch_metadata=_matmul_launch_metadata)", ""
    )
    loads = r"tl\._experimental_descriptor_load\(\s*(\w+), (\[.*?\]), \[.*?\], dtype\s*\)"
    text = re.sub(loads, r"\1.load(\2)", text, flags=re.DOTALL)
    text = re.sub(r"tl\._experimental_descriptor_store\((\w+), c, (\[.*?\])\)", r"\1.store(\2, c)", text)
    text = re.sub(r"dtype = tl\.float8e4nv if .*", "dtype = tl.bfloat16", text)
    return _loaded("calibration_product", f"import triton\nimport triton.language as tl\n\n{text}", folder)


def _compiled(name, attention, product):
    import torch
    from triton.tools.tensor_descriptor import TensorDescriptor

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    config = CONFIGS[name]
    m, n, options = config["block_m"], config["block_n"], dict(num_warps=config["warps"], num_stages=config["stages"])
    if name.startswith("product"):
        k, size = config["block_k"], 8192
        places = ([m, k], [n, k], [m, n])
        tiles = (TensorDescriptor.from_tensor(meta(size, size), place) for place in places)
        blocks = dict(BLOCK_SIZE_M=m, BLOCK_SIZE_N=n, BLOCK_SIZE_K=k, GROUP_SIZE_M=8, FP8_OUTPUT=False)
        programs = H100.multiprocessors
        return product.matmul_kernel_tma_persistent.warmup(
            *tiles, size, size, size, **blocks, NUM_SMS=programs, grid=(programs,), **options
        )
    by_descriptors = "descriptors" in name
    kernel = attention._attn_fwd_tma_unified if by_descriptors else attention._attn_fwd_base_opt
    x, sums = meta(4, 32, 2048, 128), meta(4, 32, 2048, dtype=torch.float32)
    descriptors = [] if by_descriptors else [None] * 4
    chosen = dict(Z=4, H=32, N_CTX=2048, BLOCK_M=m, BLOCK_N=n, HEAD_DIM=128, STAGE=1)  # 1: without a mask
    chosen |= dict(ENABLE_TMA=by_descriptors, LOOP_SCHEDULE="default", ENABLE_WS=False)
    chosen |= dict(HAS_EXPLICIT_WS=False) if by_descriptors else {}
    return kernel.fn.warmup(x, x, x, 0.5, sums, x, *descriptors, *x.stride() * 4, grid=(1,), **chosen, **options)
