"""Ahead-of-time compilation of every shipped kernel: registers, spills, shared memory and tensor cores, without a GPU."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton

from ..dispatch import malformed
from ..files import cache_folder, read_json, regular, write_json
from ..launch import architecture
from .calls import SHARED_LIMITS, SHIPPED_CALLS
from .gates import loop_failures
from .gpus import GPU, GPUS
from .predict import MODEL_TITLES, figures, model_cells

TENSOR_MEMORY_COLUMNS = 512
FIGURES = (
    "registers",
    "spill_bytes",
    "stack_bytes",
    "shared_bytes",
    "tensor_memory_columns",
    "matrix_products",
    "tensor_core_instructions",
    "tensor_core_kind",
    "seconds",
)
_OF_THE_MODEL = ("cubin", "grid", "numbers", "tensors", "constants", "programs")  # kept on disk and not printed


def default_architectures() -> list[str]:
    """The present GPU's; those of the shipped launch tables where there is none."""
    if torch.cuda.is_available():
        return [architecture(torch.device("cuda"))]
    return ["sm_80", "sm_89", "sm_90", "sm_100"]


def modelled_gpu(name: str | None, architectures: Sequence[str] | None = None) -> GPU | None:
    """The GPU of that name. ValueError unless it is known and of every architecture asked for."""
    if name is None:
        return None
    if name not in GPUS:
        raise malformed("model", name, f"one of {', '.join(GPUS)}")
    gpu = GPUS[name]
    for arch in architectures or ():
        if arch != gpu.architecture:
            raise malformed("arch", arch, f"{gpu.architecture} with --model {name}")
    return gpu


def compile_report(
    calls: Sequence[dict[str, Any]], jobs: int, refresh: bool = False, gpu: GPU | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Compile the calls, `jobs` at a time -> for each call, in order and as they finish, its list of lines.

    A line is a kernel: the fields of its call, kernel, config, FIGURES, triton, error (None, or why it did not compile)
    and failures, the gates it does not pass; with a GPU also what `predict.figures` says of it there, and what its loops must not
    hold among the gates. What is on disk from before is used unless `refresh`: kept by a hash of the call, of all sources of the
    kernels and of Triton's version, while Triton's cache still holds the kernels.
    """
    sources = _hash_of_sources()
    if gpu is not None:  # kernels with as many programs as multiprocessors
        calls = [call | {"programs": gpu.multiprocessors} for call in calls]
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda call: _report_call(call, sources, refresh, gpu), calls)


def failures(line: dict[str, Any]) -> list[str]:
    """What keeps this kernel from shipping, in words; empty where nothing does."""
    if line["error"] is not None:
        return [line["error"]]
    found = []
    if line["spill_bytes"]:
        found.append(f"{line['spill_bytes']} bytes of registers spilled")
    if line["shared_bytes"] > SHARED_LIMITS[line["arch"]]:
        found.append(f"{line['shared_bytes']} bytes of shared memory, {line['arch']} has {SHARED_LIMITS[line['arch']]}")
    if line["tensor_memory_columns"] > TENSOR_MEMORY_COLUMNS:
        found.append(f"{line['tensor_memory_columns']} columns of tensor memory of {TENSOR_MEMORY_COLUMNS}")
    multiplies = line["matrix_products"] > 0 and line["dtype"] != "float32"
    if line["arch"] == "sm_90" and multiplies and "HGMMA" not in (line["tensor_core_kind"] or ""):
        found.append(f"no HGMMA instruction, {line['tensor_core_kind'] or 'no tensor cores'} instead")
    return found + loop_failures(line)


def describe(line: dict[str, Any]) -> str:
    """A line's kernel in a few words."""
    call = f"{line['arch']} {line['variant']} head_dim {line['head_dim']} {line['dtype']} length {line['length']}"
    return f"{line['kernel']} ({call}, {_config(line)})"


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The report as aligned text."""
    titles = ["kernel", "arch", "variant", "D", "dtype", "length", "config"]
    titles += ["regs", "spill", "stack", "shared", "tensor cores", "s"]
    names = ("registers", "spill_bytes", "stack_bytes", "shared_bytes")
    modelled = any("model" in line for line in lines)
    rows = [[*titles, *(MODEL_TITLES if modelled else ()), ""]]
    for line in lines:
        row = [line[name] for name in ("kernel", "arch", "variant", "head_dim", "dtype", "length")]
        row += [_config(line), *(line[name] for name in names)]
        row += [f"{line['tensor_core_instructions'] or '-'} {line['tensor_core_kind'] or ''}", line["seconds"]]
        row += model_cells(line) if modelled else []
        rows.append([*("-" if cell is None else str(cell) for cell in row), "FAILS" if line["failures"] else ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _config(line):
    if line["config"] is None:
        return "-"
    config = line["config"]
    tile = "x".join(str(config[name]) for name in ("block_m", "block_n", "block_k") if name in config)
    words = [tile, f"{config['warps']} warps", f"{config['stages']} stages"]
    return " ".join([*words, *(name for name in ("descriptors", "ahead") if config.get(name))])


def _report_call(call, sources, refresh, gpu=None):
    path = _kept_at(call, sources)
    lines = None if refresh else _kept(path)
    if lines is None:
        lines = _compile(call)
        if all(line["error"] is None for line in lines):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"sha256": _hash_of(lines), "lines": lines}, indent=None)
    lines = [line | (figures(line, gpu) if gpu is not None else {}) for line in lines]
    lines = [{name: value for name, value in line.items() if name not in _OF_THE_MODEL} for line in lines]
    return [{**line, "failures": failures(line)} for line in lines]


def compile_lines(call: dict[str, Any], gpu: GPU | None = None) -> list[dict[str, Any]]:
    """Lines of one call that need not be a shipped one: `configs`, `sizes` and `programs` as the worker takes them."""
    return _report_call(call, _hash_of_sources(), False, gpu)


def _kept_at(call, sources):
    description = [call, sources, triton.__version__, triton.knobs.cache.dir]
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "compile-report" / f"{digest}.json"


def _kept(path):
    """The lines there, None where they are to be made anew: none are there, they are damaged, or kernels of theirs are gone."""
    regular(path, "compile report")
    try:
        kept = read_json(path)
    except (FileNotFoundError, ValueError):
        return None
    lines = kept.get("lines")
    if kept.get("sha256") != _hash_of(lines):
        return None
    return lines if all(Path(line["cubin"]).exists() for line in lines) else None


def _hash_of(lines):
    return hashlib.sha256(json.dumps(lines, sort_keys=True).encode()).hexdigest()


def _hash_of_sources():
    digest = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _compile(call):
    """Lines of one call, from processes without Triton's interpreter; the next goes on where one broke off."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    description = {name: value for name, value in call.items() if name != "operator"}
    description |= {"module": SHIPPED_CALLS[call["operator"]].module, "skip": []}
    empty = {
        **call,
        "kernel": None,
        "config": None,
        **dict.fromkeys(FIGURES),
        "triton": triton.__version__,
        "error": None,
    }
    lines = {}
    while True:
        command = [sys.executable, "-m", "layalign.kernels.ahead_of_time.worker", json.dumps(description)]
        process = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", check=False
        )
        unfinished = None
        for said in map(json.loads, process.stdout.splitlines()):
            if "kernel" in said:
                unfinished = said["launch"]
                lines[unfinished] = {**empty, "kernel": said["kernel"], "config": said["config"]}
            elif said["figures"] is None:
                del lines[said["launch"]]
                unfinished = None
            else:
                lines[said["launch"]] |= said["figures"]
                unfinished = None
            description["skip"].append(said["launch"])
        if process.returncode == -signal.SIGINT:
            raise KeyboardInterrupt
        if process.returncode == 0:
            return list(lines.values())
        error = last_error(process.stderr, process.returncode)
        if unfinished is None:  # the launcher itself: nothing to leave out
            return [*lines.values(), {**empty, "kernel": "launcher", "error": error}]
        lines[unfinished]["error"] = error


def last_error(stderr: str, returncode: int) -> str:
    """The line of a failed process's output that says most: the last that speaks of an error, else the last."""
    written = [line.strip() for line in stderr.splitlines() if line.strip()] or ["no message"]
    said = next(
        (line for line in reversed(written) if re.search(r"error\b|Error\b|Failure\b|Assertion", line)), written[-1]
    )
    if said.endswith(":"):  # Triton's compiler shows the source next, and says what is wrong with it at the end
        said = f"{said} {written[-1]}"
    return said if returncode > 0 else f"{signal.Signals(-returncode).name}: {said}"
