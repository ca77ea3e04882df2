"""`make gpu` rehearsed: processes that hang and die are replaced, a second run goes on, and a GPU's image holds all it needs."""

import json
import os
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from bench import attempts
from bench.attempts import Attempts, device_lost, read_lines, settle
from bench.first_light import record as records
from bench.first_light.__main__ import FirstLight, parsed, present_gpu
from bench.first_light.record import Record
from bench.first_light.stages import Step, stages
from bench.first_light.supervise import Outcome, Run, attempts_of, pytest_command, supervise

ROOT = Path(__file__).parents[2]
FIRST = [step.name for step in stages(1, 1)[0].steps]
FAULTS = "stream_linear=resources,attention backward=wrong,decode=kills,layer_mix=hangs"
# What a GPU's image may lack, and what else of ours no part of `make gpu` may need.
ABSENT = ("num2words2", "gguf", "datasets", "accelerate", "sacrebleu", "tensorboard", "pandas", "pyarrow", "setuptools")
TOY = """
import os, signal, time
import pytest
from bench import attempts

@pytest.mark.parametrize("name", ["first", "killer", "sleeper", "wrong", "last"])
def test_toy(name):
    if name == "killer":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "sleeper":
        time.sleep(1e6)
    assert name != "wrong", "this one is wrong"

@pytest.mark.parametrize("case", ["one", "two"])
def test_table(case):
    with attempts.case(case):
        if (reason := attempts.why_not("ours")) is not None:
            pytest.fail(reason, pytrace=False)
        with attempts.trying("ours"):
            time.sleep(1e6)

@pytest.mark.parametrize("case", ["three", "four"])
def test_losing(case):
    with attempts.case(case), attempts.trying("ours"):
        if (reason := attempts.why_not("ours")) is not None:
            pytest.fail(reason, pytrace=False)
        attempts.end_if_lost("ours", "fails: illegal address")
"""

COMPILING = """
import json, sys
for index in range(4):
    sys.stderr.write(f"\\r{index}/4 calls |##")
    sys.stderr.flush()
    for variant in ("plain", "causal"):
        spilled = {"spill_bytes": 8, "failures": ["8 bytes spilled"]} if variant == "plain" else {"spill_bytes": 0, "failures": []}
        print(json.dumps({"kernel": f"kernel_{index}", "variant": variant} | spilled), flush=True)
sys.exit(1)
"""


@pytest.fixture
def lean(without):
    """A folder to import from, in which what the image lacks is absent."""
    return without(ABSENT)


@pytest.fixture
def first_light(run_command, tmp_path):
    """first_light(*arguments, python=, folders=) -> the finished run, and the outcomes of its steps."""

    def run(*arguments, python=sys.executable, folders=(ROOT,)):
        given = ["--results", tmp_path / "results", "--workers", "2", "--limit", "30", *arguments]
        done = run_command([python, "-m", "bench.first_light", *map(str, given)], *folders)
        path = tmp_path / "results" / "first_light.json"
        return done, json.loads(path.read_text())["steps"] if path.exists() else {}

    return run


def toy_run(tmp_path, index, *more):
    (tmp_path / "test_toy.py").write_text(TOY)
    command = pytest_command(str(tmp_path / "test_toy.py"), f"--rootdir={tmp_path}", *more)
    return Run(command, tmp_path / f"attempts-{index}", limit=4, log=tmp_path / f"{index}.log")


def by_name(tests):
    return {line["test"].partition("[")[2].rstrip("]"): (line["outcome"], line["message"]) for line in tests}


def test_a_run_goes_on_after_what_ends_it(tmp_path):
    run = toy_run(tmp_path, 0)
    assert supervise([run], 60) == ("done", None)
    tests, broken = attempts_of([run.folder])
    assert by_name(tests) == {
        "first": ("passed", None),
        "killer": ("failed", "ended its process: SIGKILL"),
        "sleeper": ("failed", "hangs: no answer in 4 s"),
        "wrong": ("failed", "this one is wrong"),
        "last": ("passed", None),
        "one": ("failed", "ours hangs: no answer in 4 s"),
        "two": ("failed", "ours is not tried: in one it hangs: no answer in 4 s"),
        "three": ("passed", None),  # no GPU is lost
        "four": ("passed", None),
    }
    (ours,) = broken
    assert ours["name"] == "ours" and ours["case"] == "one" and len(tests) == 9
    run = toy_run(tmp_path, 0)
    assert supervise([run], 60) == ("done", None), "all are done"
    assert attempts_of([run.folder])[0] == tests


def test_shares_are_all_tests_once_and_time_ends_a_run(tmp_path):
    runs = [toy_run(tmp_path, index, "-k", "first or wrong or last", f"--share={index}/2") for index in range(2)]
    assert supervise(runs, 60) == ("done", None)
    assert sorted(by_name(attempts_of(run.folder for run in runs)[0])) == ["first", "last", "wrong"]
    run = toy_run(tmp_path, 2, "-k", "sleeper")
    run.limit = 1000
    start = time.monotonic()
    assert supervise([run], 20) == ("cut", "out of time")
    assert time.monotonic() - start < 60 and run.process.poll() is not None
    assert settle(run.folder, "it was cut"), "what was tried is told"


def test_a_run_that_never_begins_is_given_up(tmp_path):
    run = toy_run(tmp_path, 0, "--no-such-option")
    status, note = supervise([run], 60)
    assert status == "failed" and "exit status 4" in note and run.starts == 2


def test_a_lost_device_ends_the_process_after_its_test(tmp_path, monkeypatch):
    """The GPU that answers no longer after one test, or one implementation, must not fail those behind it."""
    (tmp_path / "lost.py").write_text(
        "import sys, types\n"
        "def fail():\n    raise RuntimeError('illegal address')\n"
        "cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=fail)\n"
        "sys.modules['torch'] = types.SimpleNamespace(cuda=cuda)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    run = toy_run(tmp_path, 0, "-p", "lost", "-k", "wrong or last or losing")
    assert supervise([run], 60) == ("done", None)
    assert run.starts == 6  # anew after each failed test and after each implementation
    assert by_name(read_lines(run.folder / "done.jsonl")) == {
        "wrong": ("failed", "this one is wrong"),
        "last": ("passed", None),
        "three": ("failed", "ours fails: illegal address"),
        "four": ("failed", "ours fails: illegal address"),
    }
    assert [line["case"] for line in read_lines(run.folder / "broken.jsonl")] == ["three", "four"], "each on its own"


@pytest.mark.parametrize("length", [20, 200, 201, 4000])
def test_a_long_name_is_found_again(tmp_path, monkeypatch, length):
    """The next process looks for what it calls the case, whose id may hold every launch candidate."""
    case, other = "candidates ".ljust(length, "x"), "candidates ".ljust(length, "x")[:-1] + "y"
    for reason in (None, "64x64 fails: illegal address"):
        monkeypatch.setattr(attempts, "_attempts", Attempts(tmp_path))
        attempts._attempts.enter(test="test_candidate[forward-0]", group="test_candidate")
        with attempts.case(other):
            assert attempts.why_not("64x64") is None
        with attempts.case(case), attempts.trying("64x64"):
            assert attempts.why_not("64x64") == reason
            settle(tmp_path, "fails: illegal address", everywhere=False, name="64x64")


def test_a_failed_capture_loses_the_device(monkeypatch):
    """It may leave its stream current, or the generator capturing, on a GPU that answers."""
    monkeypatch.setitem(sys.modules, "torch", gpu := Mock())
    gpu.cuda.is_initialized.return_value = False
    assert not device_lost()
    gpu.cuda.is_initialized.return_value = True
    gpu.cuda.current_stream.return_value = gpu.cuda.default_stream.return_value
    assert not device_lost()
    gpu.rand.side_effect = RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
    assert device_lost()
    gpu.rand.side_effect = None
    gpu.cuda.current_stream.return_value = "the capture's"
    assert device_lost()


def test_a_record_is_of_one_gpu_and_one_state_of_the_sources(tmp_path, monkeypatch):
    record = Record(tmp_path / "a", "GPU X")
    record.keep("smoke", Outcome("done", 1.0, [{"test": "t", "outcome": "passed", "message": None}]))
    assert Record(tmp_path / "a", "GPU X").outcomes["smoke"].tests[0]["test"] == "t"
    rows = tmp_path / "a" / "gpu-x" / "benchmarks.json"
    rows.parent.mkdir()
    rows.write_text("{}")
    assert "smoke" in Record(tmp_path / "b", "GPU X", before=tmp_path / "a").outcomes
    assert (tmp_path / "b" / "gpu-x" / "benchmarks.json").read_text() == "{}"
    assert not Record(tmp_path / "c", "GPU Y", before=tmp_path / "a").outcomes and not (tmp_path / "c").exists()
    assert not Record(tmp_path / "a", "GPU X", fresh=["smoke"]).outcomes
    other = Record(tmp_path / "a", "GPU Y")
    assert not other.outcomes and "other gpu" in other.forgot
    monkeypatch.setattr(records, "hash_of_sources", lambda: "changed")
    assert "other sources" in Record(tmp_path / "a", "GPU X").forgot


@pytest.mark.parametrize(
    ("words", "ran", "left"),
    [
        ([], ["smoke", "kernels", "host cost", "models"], []),  # what failed or was cut, and what is not begun
        (["--only", "kernels", "--fresh"], ["kernels"], ["compile", "smoke"]),
        (["--only", "compile"], [], ["compile", "smoke", "kernels"]),
    ],
)
def test_which_steps_run_again(tmp_path, monkeypatch, words, ran, left):
    def run_step(run, step, seconds, before):
        ran_here.append(step.name)
        return Outcome("done", note="here")

    monkeypatch.setattr(FirstLight, "_run_step", run_step)
    record = Record(tmp_path, present_gpu())
    for step, status in {"compile": "done", "smoke": "failed", "kernels": "cut"}.items():
        record.keep(step, Outcome(status, tests=[{"test": step, "outcome": "passed", "message": None}]))
    ran_here = []
    run = FirstLight(parsed(["--results", str(tmp_path), "--to", "A", *words]))
    if "--fresh" in words:
        assert "kernels" not in run.record.outcomes
    run._run_stage(run.stages[0])
    assert ran_here == ran
    kept = Record(tmp_path, present_gpu()).outcomes
    assert all(kept[name].tests for name in left) and all(kept[name].note == "here" for name in ran)


def test_a_report_of_failures_alone(tmp_path, crafted):
    """Where every kernel failed, that is what the run has to say."""
    path = crafted(tmp_path / "gpu-x" / "benchmarks.json", kind="gpu-x", gpu=True)
    content = json.loads(path.read_text())
    failure = {"fullname": "bench/test_decode.py::test_decode[gpu_c_mha-triton]", "error": "triton fails: no image"}
    path.write_text(json.dumps(content | {"benchmarks": [], "failures": [failure]}))
    assert "Not measured: no row has a figure." in Record(tmp_path, "GPU X").report(stages(1, 1))
    assert "triton fails: no image" in (tmp_path / "gpu-x" / "results.md").read_text()
    assert "Not measured" in (tmp_path / "first_light.md").read_text()


def test_steps_have_names_of_their_own():
    names = [step.name for stage in stages(16, 8) for step in stage.steps]
    assert len(set(names)) == len(names)
    assert FIRST == ["compile", "smoke", "kernels", "host cost", "models"]
    options = parsed(["--from", "B", "--b-seconds", "60"])
    assert (options.first, options.last, options.b_seconds) == ("B", "C", 60)
    assert parsed(["--only", "smoke, host cost,"]).only == ["smoke", "host cost"] and parsed([]).only == []


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--only", "smoke,kernel"], "--only: kernel is no step of these stages, which have compile, smoke, kernels,"),
        (["--only", "smoke", "--from", "B"], "--only: smoke is no step of these stages, which have gpu tests,"),
        (["--from", "C", "--to", "A"], "stage A comes before stage C"),
    ],
)
def test_a_run_of_nothing_is_refused(words, why, capsys):
    with pytest.raises(SystemExit, match="2"):
        parsed(words)
    assert why in capsys.readouterr().err


def test_a_bar_takes_no_line_of_what_was_compiled(tmp_path):
    """It has no end of line, so that the first result after each of its steps stands behind it on a terminal."""
    run = FirstLight(parsed(["--results", str(tmp_path)]))
    step = Step(name="compile", what="", command=[sys.executable, "-c", COMPILING])
    status, said, figures = run._run_command(step, 60)
    assert status == "failed" and said.startswith("8 kernels, 4 that fail a gate; kernel_0 plain: 8 bytes spilled")
    assert figures == {"kernels": 8, "without_figures": 0, "failing": 4, "spill_bytes": 32}
    broken = Step(name="compile again", what="", command=[sys.executable, "-c", "raise SystemExit('no such option')"])
    assert run._run_command(broken, 60)[:2] == ("failed", "0 kernels, 0 that fail a gate; no such option")


@pytest.mark.slow
def test_all_is_collected_without_what_an_image_lacks(run_command, lean):
    """Every suite that a stage runs but the GPU tests, which are below; and the absence is one."""
    absent = run_command([sys.executable, "-c", "import datasets"], lean)
    assert "No module named 'datasets'" in absent.stderr
    arguments = ["-p", "bench.first_light.rehearsal", "--small", "bench/first_light/smoke.py", "bench"]
    arguments += ["bench/first_light/candidates.py"]
    done = run_command([sys.executable, "-m", "pytest", "-q", "--collect-only", *arguments], ROOT, lean)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def check_rehearsal(done, steps):
    """The faults stand in the goal table, and all other rows are there."""
    told = done.stdout[-20000:] + done.stderr[-2000:]
    assert done.returncode == 1, told
    assert all(steps[name]["status"] == "done" for name in FIRST), told
    goals = done.stdout.partition("## Goals on pretended GPU")[2].splitlines()
    verdicts = {line.split(" | ")[1]: line.split(" | ")[-1].rstrip(" |") for line in goals if line.startswith("| ")}
    for what, verdict in {
        "stream_linear forward, weights shared: of cuBLAS": "triton fails: OutOfResources: out of resource",
        "attention forward + backward, (b) / best two calls": "triton is wrong: relative error",
        "decode, (c) GQA / best two calls": "triton ended its process: SIGKILL",
        "decode, (c) MHA: of copy bandwidth": "triton is not tried: in",
        "layer_mix forward: of copy bandwidth": "triton hangs: no answer in",
        "layer_mix backward: of copy bandwidth": "triton is not tried: in",
    }.items():
        assert verdicts[what].startswith(f"no figure: {verdict}"), told
    for what in (
        "attention forward, (b) / best two calls",
        "aligner folded / unfolded, MHA",
        "training step, llama_2_7b / bare LLM",
        "generation, llama_2_7b_8 / bare LLM",
        "peak memory of a training step, llama_2_7b / published",
        "host cost of a call above an empty launch: decode",
        "host cost of a call above an empty launch: backward, masks",
    ):
        assert verdicts[what] == "rehearsed: says nothing", told
    passed = {line["test"] for step in steps.values() for line in step["tests"] if line["outcome"] == "passed"}
    for peer in (
        "decode[gpu_c_gqa-two calls]",
        "layer_mix[gpu-forward-copy]",
        "forward_and_backward[gpu_b_mha-two calls]",
        "kernel[attention forward-again]",
        "kernel[attention forward-span]",
        "kernel[attention forward-masked]",
    ):
        assert any(test.endswith(f"test_{peer}") for test in passed), told


@pytest.mark.slow
def test_rehearsal(first_light, lean, tmp_path):
    """Stage A with a kernel that hangs, one that is wrong, one that lacks resources and one that kills its process; then again."""
    done, steps = first_light("--to", "A", "--rehearse", FAULTS, folders=(ROOT, lean))
    check_rehearsal(done, steps)
    table = (tmp_path / "results" / "pretended-gpu" / "results.md").read_text()
    assert "## Without a figure" in table and "**Sizes of `--small`" in table
    assert "smoke: done" in (tmp_path / "results" / "first_light.md").read_text()

    again, same = first_light("--to", "A", "--rehearse", FAULTS, folders=(ROOT, lean))
    assert again.returncode == 1 and same == steps
    assert [line.partition(" ")[2] for line in again.stdout.splitlines() if line.endswith("before")] == [
        f"{name}: done before" for name in FIRST
    ]


@pytest.mark.slow
def test_stage_b_is_collected(first_light, lean):
    """Nothing can run without a GPU; all of it is found, and skipped for that reason alone."""
    done, steps = first_light(
        "--from",
        "B",
        "--to",
        "B",
        "--rehearse",
        "",
        "--workers",
        "1",
        "--only",
        "gpu tests,addresses",
        folders=(ROOT, lean),
    )
    assert done.returncode == 0, done.stdout[-3000:]
    messages = {line["message"] for step in steps.values() for line in step["tests"]}
    assert messages == {"needs a CUDA device and compiled Triton kernels"}
    assert len(steps["gpu tests"]["tests"]) > 200 and len(steps["addresses"]["tests"]) >= 3


@pytest.mark.slow
@pytest.mark.skipif(
    not (ROOT / ".venv-replica" / ".installed").exists(), reason="`make gpu-replica` makes the environment"
)
def test_rehearsal_in_the_replica(first_light):
    """With the versions that a GPU's image has, as far as they can be had here."""
    check_rehearsal(*first_light("--to", "A", "--rehearse", FAULTS, python=ROOT / ".venv-replica" / "bin" / "python"))
