"""The command line as such: its version, what a model is, lists and short names, and how commands end that cannot go on."""

import json
import shutil
import sys

import pytest
import torch
from typer.testing import CliRunner

import layalign
from layalign import LayAlignForConditionalGeneration
from layalign.cli import app, main
from layalign.commands.options import Running, Sampling, listed
from layalign.configuration import SETTINGS
from layalign.generation.jobs import generate_texts
from layalign.loading import fingerprint


def run(*words):
    """Standard output."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.stdout


def ended(monkeypatch, capsys, *words):
    """Exit status and standard error of a command line."""
    monkeypatch.setattr(sys, "argv", ["layalign", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, capsys.readouterr().err


def test_the_version_and_completion():
    assert run("--version").startswith(f"layalign {layalign.__version__} (python 3.")
    assert f"torch {torch.__version__}" in run("--version")
    assert "--install-completion" in run("--help")


def test_info_says_what_a_model_is(model_folder, loaded):
    model, _ = loaded
    found = json.loads(run("info", model_folder, "--json"))
    assert found["fingerprint"] == fingerprint(model_folder)
    assert found["bases"]["llm"]["found"] == model.config.llm_name_or_path
    assert found["bases"]["llm"]["layers"] == model.config.llm_config.num_hidden_layers
    assert found["trained"]["total"] == sum(own.numel() for _, own in model.trained_parameters())
    parts = {name: count for name, count in found["trained"].items() if name not in ("total", "dtype")}
    assert parts.keys() == {"adapter", "aligner", "gates"}
    assert sum(parts.values()) == found["trained"]["total"]
    assert found["settings"].keys() == set(SETTINGS)
    assert "gate" in SETTINGS
    assert "keys_to_ignore_at_inference" not in SETTINGS  # transformers' own
    text = run("info", model_folder)
    assert f"{found['trained']['total']:,} parameters" in text
    assert found["fingerprint"] in text


def test_a_moved_base_is_named_and_given(model_folder, loaded, questions, tmp_path, monkeypatch, capsys):
    """`--llm` and `--encoder` say where the bases of a model are now."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    bases = {role: config[f"{role}_name_or_path"] for role in ("encoder", "llm")}
    for role in bases:
        config[f"{role}_name_or_path"] = str(tmp_path / "gone" / role)
    config.pop("base_sources", None)
    (folder / "config.json").write_text(json.dumps(config))
    told = json.loads(run("info", folder, "--json"))["bases"]["llm"]
    assert told["found"] is None
    assert "pass llm=" in told["note"]
    asked = ("generate", folder, questions[0], "--max-new-tokens", 3, "--device", "cpu")
    code, err = ended(monkeypatch, capsys, *asked)
    assert code == 2
    assert "gone/encoder" in err
    assert run(*asked, "--encoder", bases["encoder"], "--llm", bases["llm"]) == run(
        "generate", model_folder, *asked[2:]
    )


def test_sampling(model_folder, questions, tmp_path):
    """The same seed gives the same answers, whatever was drawn before; another gives others."""

    def sampled(seed, output=None):
        torch.rand(3)
        given = Sampling(temperature=5.0, seed=seed).given()
        records = generate_texts(model_folder, questions[:6], device="cpu", max_new_tokens=6, output=output, **given)
        return [record["answer"] for record in records]

    assert sampled(0) == sampled(None) == sampled(0, tmp_path / "answers.jsonl")
    assert sampled(0) != sampled(1)
    with pytest.raises(ValueError, match="different seed"):
        sampled(1, tmp_path / "answers.jsonl")
    beams = generate_texts(model_folder, questions[:1], device="cpu", max_new_tokens=6, **Sampling(num_beams=2).given())
    assert beams[0]["answer"]


def test_options_of_sampling_go_together():
    assert Sampling(temperature=0).given() == {}
    assert Sampling(top_k=5).given() == {"do_sample": True, "seed": 0, "top_k": 5}
    with pytest.raises(ValueError, match="--seed goes with --temperature"):
        Sampling(seed=1).given()
    with pytest.raises(ValueError, match="--temperature 0 is greedy, top_p samples"):
        Sampling(temperature=0, top_p=0.9).given()


def test_lists_and_short_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b.jsonl").write_text("")
    assert listed("en, de", "--languages") == ["en", "de"]
    assert listed(["mgsm,xnli", "a,b.jsonl"], "--task") == ["mgsm", "xnli", "a,b.jsonl"]
    assert listed(None, "--task") is None
    with pytest.raises(ValueError, match="--task: got 'a,,b', takes names parted by commas"):
        listed("a,,b", "--task")
    assert Running(dtype="bf16").given()["dtype"] == "bfloat16"
    assert Running(dtype="fp17").given()["dtype"] == "fp17"


def test_places_that_cannot_be_are_one_line(model_folder, questions, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    asked = ("generate", model_folder, "--device", "cpu")
    code, err = ended(monkeypatch, capsys, *asked, "--file", tmp_path)
    assert (code, err) == (2, f"layalign: file: {tmp_path} is a folder, takes a file\n")
    code, err = ended(monkeypatch, capsys, *asked, questions[0], "--output", tmp_path / "file" / "below" / "out.jsonl")
    assert code == 2
    assert err.startswith(f"layalign: {tmp_path}/file")
    assert err.count("\n") == 1


def test_a_model_that_is_none(tmp_path, monkeypatch, capsys):
    LayAlignForConditionalGeneration.config_class(gate="head").save_pretrained(tmp_path)
    code, err = ended(monkeypatch, capsys, "info", tmp_path)
    assert code == 2
    assert "holds no LayAlign model" in err
