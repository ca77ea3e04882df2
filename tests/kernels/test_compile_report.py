"""The ahead-of-time compile report, on toy kernels."""

import json
import os
import subprocess
import sys

import pytest
import torch
import triton
from typer.testing import CliRunner

from layalign.cli import app, main
from layalign.kernels.adaptive_fusion_attention import shipped_calls
from layalign.kernels.ahead_of_time import calls as compile_calls
from layalign.kernels.ahead_of_time import report as compile_report
from layalign.kernels.ahead_of_time import worker as compile_worker
from layalign.kernels.ahead_of_time.calls import SHIPPED_CALLS, ShippedCalls, described_calls

TOYS = """
import os

import torch
import triton
import triton.language as tl

from layalign.kernels.launch import LaunchConfig, architecture, launch


@triton.jit
def product_kernel(a, out, rows, stride, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    o_row, o_d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask = (o_row < rows)[:, None] & (o_d < WIDTH)[None, :]
    b_a = tl.load(a + o_row[:, None] * stride + o_d[None, :], mask=mask, other=0.0)
    result = tl.dot(tl.dot(b_a, tl.trans(b_a)).to(b_a.dtype), b_a)
    tl.store(out + o_row[:, None] * stride + o_d[None, :], result.to(b_a.dtype), mask=mask)


@triton.jit
def descriptor_kernel(a, out, rows, stride, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    d_a = tl.make_tensor_descriptor(a, [rows, WIDTH], [stride, 1], [BLOCK_M, BLOCK_D])
    d_out = tl.make_tensor_descriptor(out, [rows, WIDTH], [stride, 1], [BLOCK_M, BLOCK_D])
    b_a = d_a.load([0, 0])
    d_out.store([0, 0], tl.dot(tl.dot(b_a, tl.trans(b_a)).to(b_a.dtype), b_a).to(b_a.dtype))


@triton.jit
def refused_kernel(a, BLOCK_M: tl.constexpr):
    tl.static_assert(BLOCK_M == 0, "a tile of no rows")


class aborting_kernel:
    __name__ = "aborting_kernel"

    @staticmethod
    def warmup(*args, **options):
        print("the compiler's last words", flush=True)
        os.abort()


def run(variant, head_dim, dtype, length):
    assert "TRITON_INTERPRET" not in os.environ and architecture(torch.device("meta")).startswith("sm_")
    a = torch.empty(length, head_dim, dtype=dtype, device="meta")
    small, large = (LaunchConfig(block_m=rows, block_n=rows, warps=4, stages=2) for rows in (64, 128))
    arguments = (a, a, length, a.stride(0))
    shape = dict(WIDTH=head_dim, BLOCK_D=triton.next_power_of_2(head_dim))
    launch(product_kernel, (1,), small, *arguments, **shape, BLOCK_M=64)
    launch(product_kernel, (1,), small, *arguments, **shape, BLOCK_M=64)
    launch(descriptor_kernel, (1,), small, *arguments, **shape, BLOCK_M=64)
    if variant == "broken":
        launch(refused_kernel, (1,), small, a, BLOCK_M=64)
        launch(aborting_kernel, (1,), small, a)
        launch(product_kernel, (1,), large, *arguments, **shape, BLOCK_M=128)
        raise ValueError("the launcher stumbles")
"""


@pytest.fixture(autouse=True)
def toys(monkeypatch, tmp_path):
    """An operator of toy kernels is all that ships, and all caches are empty."""
    (tmp_path / "toys.py").write_text(TOYS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("LAYALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    shipped = {"toy": ShippedCalls("toys", ("sound", "broken"), True, lambda variant, **of_launch_table: (1000,))}
    monkeypatch.setattr(compile_calls, "SHIPPED_CALLS", shipped)
    monkeypatch.setattr(compile_report, "SHIPPED_CALLS", shipped)
    return tmp_path


def report(calls, **options):
    return [line for lines in compile_report.compile_report(calls, 1, **options) for line in lines]


def test_a_report_is_kept_while_triton_keeps_the_kernels(toys, monkeypatch):
    calls = described_calls(["sm_90"], head_dims=[96], dtypes=["float16"], variants=["sound"])
    lines = report(calls)
    assert [line["kernel"] for line in lines] == ["product_kernel", "descriptor_kernel"]  # once, though launched twice
    for line in lines:
        assert {name: line[name] for name in calls[0]} == calls[0]
        assert line["config"] == {"block_m": 64, "warps": 4, "stages": 2}
        assert 32 < line["registers"] < 256 and line["spill_bytes"] == line["stack_bytes"] == 0
        assert line["shared_bytes"] >= 64 * 128 * 2 and line["tensor_memory_columns"] == 0
        assert line["matrix_products"] == 2 and line["tensor_core_kind"] == "HGMMA"
        assert line["tensor_core_instructions"] >= 2 and line["seconds"] > 0
        assert line["triton"] == triton.__version__ and line["error"] is None and line["failures"] == []
    cubins = list((toys / "triton").rglob("*.cubin"))
    assert len(cubins) == 2

    asked = []
    monkeypatch.setattr(compile_report, "_compile", lambda call: asked.append(call) or [])
    assert report(calls) == lines and not asked
    report(calls, refresh=True)
    assert asked == calls
    report(described_calls(["sm_90"], head_dims=[64], dtypes=["float16"], variants=["sound"]))
    assert len(asked) == 2


def test_kept_only_while_triton_holds_the_kernels_and_the_sources_stay(toys, monkeypatch):
    cubin = toys / "kernel.cubin"
    cubin.touch()
    compiled = []
    line = {"arch": "sm_80", "dtype": "float16", "cubin": str(cubin), "error": None, "spill_bytes": 8}
    line |= {"shared_bytes": 0, "tensor_memory_columns": 0, "matrix_products": 0, "tensor_core_kind": None}
    monkeypatch.setattr(compile_report, "_compile", lambda call: compiled.append(call) or [line])
    calls = described_calls(["sm_80"], head_dims=[64], variants=["sound"])
    assert report(calls) == report(calls) and len(compiled) == 1
    assert report(calls)[0]["failures"] == ["8 bytes of registers spilled"]
    monkeypatch.setattr(compile_report, "_hash_of_sources", lambda: "others")
    report(calls)
    assert len(compiled) == 2
    cubin.unlink()
    report(calls)
    assert len(compiled) == 3
    line["error"] = "SIGKILL: no message"
    report(calls)
    report(calls)
    assert len(compiled) == 5  # what failed may have been the machine's fault, and is tried again


def test_a_damaged_report_is_made_anew_and_what_is_no_file_is_named(toys, monkeypatch):
    (toys / "kernel.cubin").touch()
    compiled = []
    line = {"kernel": "product", "registers": 96, "cubin": str(toys / "kernel.cubin"), "error": None}
    monkeypatch.setattr(compile_report, "_compile", lambda call: compiled.append(call) or [line])
    monkeypatch.setattr(compile_report, "failures", lambda line: [])
    calls = described_calls(["sm_80"], head_dims=[64], variants=["sound"])
    lines = report(calls)
    (file,) = (toys / "cache" / "compile-report").iterdir()
    whole = file.read_bytes()
    damaged = [whole.replace(b"96", b"95"), whole[:-9], b"", b"null", b"\xff" + whole, b"[" * 100_000, b"[1]"]
    for number, content in enumerate(damaged, 2):
        file.write_bytes(content)
        assert report(calls) == lines and len(compiled) == number and file.read_bytes() == whole
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match=rf"compile report: .*{file.name} is a folder, takes a file"):
        report(calls)


def test_failing_kernels_are_lines_and_the_rest_goes_on():
    lines = report(described_calls(["sm_80"], head_dims=[128], variants=["broken"]))
    assert [line["kernel"] for line in lines] == [
        "product_kernel",
        "descriptor_kernel",
        "refused_kernel",
        "aborting_kernel",
        "product_kernel",
        "launcher",
    ]
    sound, _, refused, aborting, spilling, launcher = lines
    assert sound["failures"] == [] and sound["tensor_core_kind"] == "HMMA"
    assert refused["error"].endswith("a tile of no rows") and "\n" not in refused["error"]
    assert aborting["failures"] == ["SIGABRT: the compiler's last words"]
    assert launcher["failures"] == ["ValueError: the launcher stumbles"]
    assert spilling["registers"] == 255 and spilling["stack_bytes"] > 0 < spilling["spill_bytes"]
    assert spilling["failures"] == [f"{spilling['spill_bytes']} bytes of registers spilled"]
    assert len(compile_report.table(lines).splitlines()) == 7
    assert compile_report.describe(spilling) == (
        "product_kernel (sm_80 broken head_dim 128 bfloat16 length 1000, 128 4 warps 2 stages)"
    )
    ahead = spilling | {"config": spilling["config"] | {"descriptors": True, "ahead": True}}
    assert compile_report.describe(ahead).endswith("4 warps 2 stages descriptors ahead)")


def test_meta_tensors_are_specialised_as_real_ones(toys):
    """Triton's cache has one entry for both, so what the report compiled serves a launch; other alignment is another."""
    code = """
import sys, torch, triton, toys
from layalign.kernels.ahead_of_time.worker import AbsentGPU
assert "torch._dynamo" not in sys.modules  # two seconds of each worker's
triton.runtime.driver.set_active(AbsentGPU("sm_80"))
def compiled(device, offset, rows):
    a = torch.empty(1032 * 64, dtype=torch.float16, device=device)[offset:][:1024 * 64].view(1024, 64)
    shape = dict(WIDTH=64, BLOCK_D=64, BLOCK_M=64)
    return toys.product_kernel.warmup(a, a, rows, a.stride(0), grid=(1,), num_warps=4, **shape).hash
cases = [(0, 1024), (1, 1024), (8, 1000), (0, 1)]
meta = [compiled("meta", *case) for case in cases]
assert meta == [compiled("cpu", *case) for case in cases] and len(set(meta)) == 4
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x37c] ;    /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 STL.64 [R1+0x10], R2 ;
        /*0020*/                   STL [R1], R4 ;
        /*0030*/                   LDL.LU.128 R8, [R1] ;
        /*0040*/              @UP1 UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;
        /*0050*/                   HFMA2.MMA R1, -RZ, RZ, 0, 0 ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R4, R8, R12 ;
        /*0070*/                   LDL.U8 R9, [R1+0x8] ;
"""
USAGE = "Function product_kernel:\n  REG:255 STACK:24 SHARED:1024 LOCAL:0 CONSTANT[0]:576 TEXTURE:0\n"


def test_figures_from_the_disassembly():
    assert compile_worker.resources(USAGE, SASS) == {
        "registers": 255,
        "spill_bytes": 17,
        "stack_bytes": 24,
        "tensor_core_instructions": 2,
        "tensor_core_kind": "HMMA+UTCHMMA",
    }
    plain = compile_worker.resources(USAGE, "        /*0000*/                   EXIT ;\n")
    assert plain["spill_bytes"] == plain["tensor_core_instructions"] == 0 and plain["tensor_core_kind"] is None


LINE = {
    **dict(operator="toy", arch="sm_90", variant="sound", head_dim=64, dtype="bfloat16", length=1024, kernel="forward"),
    **dict(config={"block_m": 64, "block_n": 32, "warps": 4, "stages": 3, "descriptors": True}, registers=168),
    **dict(spill_bytes=0, stack_bytes=0, shared_bytes=1000, tensor_memory_columns=0, matrix_products=2),
    **dict(tensor_core_instructions=24, tensor_core_kind="HGMMA", seconds=1.5, triton="3.9.0", error=None, failures=[]),
}


@pytest.mark.parametrize(
    "change, said",
    [
        ({}, None),
        ({"arch": "sm_80", "shared_bytes": 166_912}, None),
        ({"arch": "sm_80", "shared_bytes": 166_913}, "166913 bytes of shared memory, sm_80 has 166912"),
        ({"arch": "sm_86", "shared_bytes": 101_377}, "101377 bytes of shared memory, sm_86 has 101376"),
        ({"arch": "sm_89", "shared_bytes": 101_377}, "101377 bytes of shared memory, sm_89 has 101376"),
        ({"shared_bytes": 232_449}, "232449 bytes of shared memory, sm_90 has 232448"),
        ({"arch": "sm_100", "shared_bytes": 232_449}, "232449 bytes of shared memory, sm_100 has 232448"),
        ({"arch": "sm_100", "tensor_memory_columns": 513}, "513 columns of tensor memory of 512"),
        ({"spill_bytes": 8, "stack_bytes": 8}, "8 bytes of registers spilled"),
        ({"stack_bytes": 8}, None),
        ({"tensor_core_kind": "HMMA"}, "no HGMMA instruction, HMMA instead"),
        ({"tensor_core_kind": None, "tensor_core_instructions": 0}, "no HGMMA instruction, no tensor cores instead"),
        ({"tensor_core_kind": "HMMA", "arch": "sm_80"}, None),
        ({"tensor_core_kind": None, "dtype": "float32"}, None),
        ({"tensor_core_kind": None, "matrix_products": 0}, None),
        ({"error": "SIGSEGV: no message", "shared_bytes": None, "spill_bytes": None}, "SIGSEGV: no message"),
    ],
)
def test_gates(change, said):
    assert compile_report.failures({**LINE, **change}) == ([] if said is None else [said])


def test_what_a_failed_process_said():
    assert compile_report.last_error("", -11) == "SIGSEGV: no message"
    assert compile_report.last_error("a\n\nRuntimeError: PassManager::run failed\n\n", 1) == (
        "RuntimeError: PassManager::run failed"
    )
    assert compile_report.last_error("x.cpp:3: Assertion `n > 0' failed.\n #0 0x00\n", -6).startswith("SIGABRT: x.cpp")


@pytest.mark.parametrize(
    "options, takes",
    [
        ({"architectures": ["sm_91"]}, "arch: got sm_91, takes one of sm_80, "),
        ({"head_dims": [0]}, "head-dim: got 0, takes 1 to 256"),
        ({"dtypes": ["bf16"]}, "dtype: got bf16, takes one of bfloat16, float16, float32"),
        ({"variants": ["all"]}, "variant: got all, takes one of sound, broken"),
    ],
)
def test_refused_values(options, takes):
    with pytest.raises(ValueError, match=takes):
        described_calls(**{"architectures": ["sm_90"], **options})


def test_each_launch_configuration_is_compiled_once(monkeypatch):
    def launch_config(kernel, *, architecture, head_dim, dtype, length, plain):
        assert (architecture, head_dim, dtype) == ("sm_90", 64, torch.bfloat16)
        return kernel == "forward" and length > 512, plain and length <= 2048

    monkeypatch.setattr(shipped_calls, "launch_config", launch_config)
    monkeypatch.setattr(compile_calls, "SHIPPED_CALLS", SHIPPED_CALLS)
    calls = described_calls(["sm_90", "sm_90"], head_dims=[64])
    lengths = {}
    for call in calls:
        lengths.setdefault(call["variant"], []).append(call["length"])
    assert lengths == {
        "causal": [512, 2048, 16384],
        "spanned": [512, 2048, 16384],
        "padded": [512, 16384],
        "everything": [512, 16384],
        "packed": [4096],
        "decode": [1, 8, 16],
        "paged": [1, 8, 16],
        "gluon": [1024],
        "gluon_spans": [1024],
        "gluon_everything": [1024],
        "gluon_gradients": [1024],
        "gluon_gradients_spans": [1024],
        "gluon_gradients_everything": [1024],
        "folded": [2048, 48],
        "unfolded": [2048, 48],
        "streams": [2048, 48],
        "deep": [2048],
        "odd": [1999],
    }
    assert len(described_calls(["sm_90"], head_dims=[64, 128], variants=["odd"])) == 1  # the aligner has no heads


@pytest.fixture
def command(monkeypatch):
    """command(*arguments) -> exit status, standard output, standard error, and what was to be compiled."""
    asked, lines = {}, []

    def described(architectures, head_dims, dtypes, variants):
        asked.update(arch=architectures, head_dim=head_dims, dtype=dtypes, variant=variants)
        return [None]

    def compiling(calls, jobs, refresh, gpu):
        asked.update(jobs=jobs, refresh=refresh, gpu=gpu)
        yield lines

    def run(*arguments):
        result = CliRunner().invoke(app, ["kernels", *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, result.stderr, asked

    monkeypatch.setattr(compile_calls, "described_calls", described)
    monkeypatch.setattr(compile_report, "compile_report", compiling)
    monkeypatch.setattr(compile_report, "default_architectures", lambda: ["sm_89"])
    run.lines = lines
    return run


@pytest.mark.parametrize(
    "arguments",
    [
        "--arch sm_80 sm_90 --head-dim 64 96 --dtype float16",
        "--arch sm_80 --arch sm_90 --dtype float16 --head-dim=64 --head-dim 96",
        "--arch=sm_80,sm_90 --head-dim 64,96 --dtype=float16",
        "--head-dim 64 --dtype float16 --arch sm_80 --head-dim 96 --arch sm_90",
    ],
)
def test_several_values_after_an_option(command, arguments):
    status, out, _, asked = command(*arguments.split(), "--json", "--jobs", "2")
    assert status == 0 and out == ""
    assert asked["arch"] == ["sm_80", "sm_90"] and list(asked["head_dim"]) == [64, 96]
    assert list(asked["dtype"]) == ["float16"] and asked["jobs"] == 2 and asked["refresh"] is False


def test_what_the_command_does_by_default(command):
    status, *_, asked = command("--refresh")
    assert status == 0 and asked["refresh"] is True and asked["jobs"] == os.cpu_count()
    assert asked["arch"] == ["sm_89"] and list(asked["head_dim"]) == [64, 128] and list(asked["dtype"]) == ["bfloat16"]


@pytest.mark.parametrize("arguments", ["--arch", "--arch --json", "sm_80", "--head-dim wide", "--jobs 0", "--jobs 2 3"])
def test_malformed_options(command, arguments):
    assert command(*arguments.split())[0] == 2


def test_the_output_and_the_exit_status(command):
    command.lines.append(LINE)
    status, out, err, _ = command("--json")
    assert status == 0 and json.loads(out) == LINE and "fails" not in err
    status, out, _, _ = command()
    assert status == 0 and out.splitlines()[0].split()[:2] == ["kernel", "arch"]
    assert "64x32 4 warps 3 stages descriptors" in out and "24 HGMMA" in out

    command.lines.append({**LINE, "kernel": "backward", "spill_bytes": 8, "failures": ["8 bytes of registers spilled"]})
    for arguments in ([], ["--json"]):
        status, out, err, _ = command(*arguments)
        assert status == 1 and len(out.splitlines()) == (2 if arguments else 3)
        assert "fails: backward (sm_90 sound head_dim 64 bfloat16 length 1024, 64x32" in err
        assert "8 bytes of registers spilled" in err and "forward" not in err.split("fails:")[1]


def test_an_unknown_architecture_is_a_line_of_text(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["layalign", "kernels", "--arch", "sm_75"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2 and "layalign: arch: got sm_75, takes one of sm_80" in capsys.readouterr().err
