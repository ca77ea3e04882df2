"""`layalign generate --engine vllm`: the same records, resumable; what vLLM has no equal of is refused before it loads."""

import json

import pytest
from typer.testing import CliRunner

from layalign.cli import app
from layalign.generation.jobs import generate_texts
from layalign.serving.answering import EngineAnswerer
from tests.serving.conftest import QUESTIONS

pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")

NEW = 12
FP32 = {"dtype": "float32", "max_new_tokens": NEW}


@pytest.fixture
def loaded(monkeypatch):
    """Engines that were loaded, by their settings; each is small and eager."""
    import vllm

    seen, own = [], vllm.LLM

    def small(**given):
        seen.append(given)
        return own(**given, enforce_eager=True, max_model_len=256)

    monkeypatch.setattr(vllm, "LLM", small)
    return seen


def test_a_job_is_the_same_and_goes_on(model_folder, loaded, tmp_path):
    (tmp_path / "questions.txt").write_text("\n".join(QUESTIONS * 3), encoding="utf-8")
    job = {"file": tmp_path / "questions.txt", "batch_size": 4, **FP32}
    expected = generate_texts(model_folder, output=tmp_path / "own.jsonl", device="cpu", **job)
    assert generate_texts(model_folder, output=tmp_path / "vllm.jsonl", engine="vllm", **job) == expected
    assert [given["max_num_seqs"] for given in loaded] == [4]
    whole = (tmp_path / "vllm.jsonl").read_bytes()
    assert whole == (tmp_path / "own.jsonl").read_bytes()
    # Cut off in the middle, it goes on; a finished one loads nothing; another engine's output is another job's.
    (tmp_path / "vllm.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:7]))
    generate_texts(model_folder, output=tmp_path / "vllm.jsonl", engine="vllm", **job)
    assert (tmp_path / "vllm.jsonl").read_bytes() == whole
    generate_texts(model_folder, output=tmp_path / "vllm.jsonl", engine="vllm", **job)
    assert len(loaded) == 2
    with pytest.raises(ValueError, match="another job"):
        generate_texts(model_folder, output=tmp_path / "vllm.jsonl", **job)


def test_command(model_folder, loaded, tmp_path):
    """Without the prompt and with cut questions; a bad line is left out; samples are the same again and another for each text."""
    (tmp_path / "questions.txt").write_bytes(f"{QUESTIONS[0]}\n{QUESTIONS[2]}\n\xff\n".encode("latin-1"))
    options = f"--file {tmp_path}/questions.txt --on-bad-line skip --max-new-tokens {NEW} --dtype fp32".split()
    cut = ["--prompt", "none", "--encoder-max-length", "5"]

    def run(name, *more):
        result = CliRunner().invoke(app, ["generate", model_folder, *options, "-o", f"{tmp_path}/{name}", *more])
        assert result.exit_code == 0, result.output
        return [json.loads(line)["answer"] for line in (tmp_path / name).read_text().splitlines()]

    found = run("cut", *cut, "--engine", "vllm")
    assert found == run("own", *cut, "--device", "cpu") and found[2] is None
    samples = [run(name, "--engine", "vllm", "--temperature", "1.5", "--seed", "3") for name in ("once", "again")]
    assert samples[0] == samples[1] != run("other", "--engine", "vllm", "--temperature", "1.5", "--seed", "4")


REFUSED = {
    "engine": ({"engine": "tgi"}, "engine: got 'tgi', takes transformers or vllm"),
    "device": ({"device": "cpu"}, "device: the engine vllm takes the bases where the model says"),
    "beams": ({"num_beams": 2}, "vLLM takes temperature, top_p, top_k of generate's arguments, got num_beams"),
    "penalty": ({"repetition_penalty": 1.2}, "repetition_penalty: got 1.2"),
    "length": ({"encoder_max_length": 0}, "encoder_max_length"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_loaded(case, model_folder, loaded):
    given, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        generate_texts(model_folder, "2 + 5?", **{"engine": "vllm", **given})
    assert not loaded


def test_streams_and_scores_are_refused(model_folder, loaded):
    answerer = EngineAnswerer(model_folder, dtype="float32")
    with pytest.raises(ValueError, match="streamer: "):
        answerer(["2 + 5?"], streamer=object())
    with pytest.raises(NotImplementedError, match="not scored"):
        answerer.loglikelihoods(["2 + 5?"], [["7"]])
