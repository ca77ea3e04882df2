"""`layalign analyze`: measures against plain definitions, states that no batch changes, and what is written or refused."""

import json
import math
from dataclasses import replace

import pytest
import torch

from layalign import LayAlignForConditionalGeneration, LayAlignProcessor, fusion
from layalign.analysis import measures
from layalign.analysis.run import analyze
from layalign.analysis.states import branch_ratios, joined_states, llm_states
from layalign.analysis.texts import parallel_texts
from layalign.evaluation.settings import GenerationSettings
from layalign.loading import load_model
from tests.tasks.originals import FLORES, flores101

CPU = GenerationSettings(device="cpu")
FIGURES = {"english", "components", "encoder_layers", "encoder_english", "tokens"}
FUSED = {"ratio", "aligner", "gates"}


def files_of(figures):
    return {f"{name}.{kind}" for name in figures for kind in ("png", "svg", "csv")}


def test_cosines_with_english():
    states = {"en": torch.eye(3), "sw": torch.tensor([[2.0, 0, 0], [0, 0, 3.0], [0, 1.0, 1.0]])}
    half = math.sqrt(0.5)
    found = measures.against_english(states)
    assert list(found) == ["sw"]
    assert found["sw"]["same"] == pytest.approx((1 + 0 + half) / 3)
    assert found["sw"]["other"] == pytest.approx((0 + 1 + half) / 6)
    # The third is as near to English of the second meaning: the first of equals counts.
    assert found["sw"]["found"] == pytest.approx(100 / 3)
    layers = measures.by_layer({lang: torch.stack([rows, rows.flip(0)]) for lang, rows in states.items()})
    assert layers["sw"]["same"] == pytest.approx([found["sw"]["same"]] * 2)


def test_layer_similarity_is_the_mean_cosine_of_a_texts_states():
    states = {lang: torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(i)) for i, lang in enumerate("ab")}
    found = measures.layer_similarity(states)
    pairs = [torch.cosine_similarity(rows[0], rows[2], dim=-1) for rows in states.values()]
    assert found[0, 2].item() == pytest.approx(torch.cat(pairs).mean().item(), abs=1e-6)
    assert torch.allclose(found.diagonal(), torch.ones(3)) and torch.allclose(found, found.T)


def test_components_are_the_axes_of_most_variance():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 6, generator=generator) * torch.tensor([1.0, 9.0, 1.0, 4.0, 1.0, 1.0]) + 5
    found = measures.components({"en": rows[:10], "sw": rows[10:]})
    covariance = torch.linalg.eigvalsh(torch.cov(rows.double().T)).flip(0)
    assert found["share"] == pytest.approx((covariance[:2] / covariance.sum()).tolist())
    points = torch.tensor(found["points"]["en"] + found["points"]["sw"])
    assert points.var(0).tolist() == pytest.approx(covariance[:2].tolist(), rel=1e-5)
    assert [len(part) for part in found["points"].values()] == [10, 30]
    # The signs do not follow the decomposition's.
    assert torch.corrcoef(torch.stack([points[:, 0], rows[:, 1]]))[0, 1] > 0.9


@pytest.fixture(scope="module")
def texts():
    return {
        "en": ["what is 3 plus 4", "how many apples and 5", "what is 9", "so how many"],
        "sw": ["ni ngapi 3 na 4", "tufaha ngapi na 5", "ni 9", "ngapi"],
    }


def test_states_are_those_of_each_text_alone(loaded, texts):
    model, processor = loaded
    rows = texts["en"]
    together, apart = (joined_states(model, processor, rows, batch_size=size) for size in (4, 1))
    assert together.encoder.shape[:2] == (3, 4) and together.llm.shape == (4, 32) and together.ratio.shape == (2, 4)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    encoded = model.encoder(**processor.encoder_tokenizer(rows[1], return_tensors="pt")).last_hidden_state.mean(1)[0]
    torch.testing.assert_close(together.encoder[-1, 1], encoded, rtol=1e-4, atol=1e-5)
    read = {}
    hook = model.llm.model.norm.register_forward_hook(lambda module, args, out: read.update(out=out.detach()))
    model(**processor(rows[1]))
    hook.remove()
    torch.testing.assert_close(together.llm[1], read["out"].mean(1)[0], rtol=1e-4, atol=1e-5)


def test_the_llm_alone_reads_the_text_alone(loaded, texts):
    model, processor = loaded
    rows = texts["sw"]
    found = llm_states(model.llm, processor.tokenizer, rows, batch_size=3)
    ids = torch.tensor([[1, *processor.tokenizer(rows[2])["input_ids"]]])
    expected = model.llm(input_ids=ids, output_hidden_states=True).hidden_states[-1].mean(1)[0]
    torch.testing.assert_close(found[2], expected, rtol=1e-4, atol=1e-5)
    within = llm_states(model.llm, processor.tokenizer, rows, template="question {text} answer")
    ids = torch.tensor([[1, *processor.tokenizer(f"question {rows[2]} answer")["input_ids"]]])
    expected = model.llm(input_ids=ids, output_hidden_states=True).hidden_states[-1].mean(1)[0]
    torch.testing.assert_close(within[2], expected, rtol=1e-4, atol=1e-5)


def test_the_ratio_is_that_of_the_two_branches(loaded, texts, monkeypatch):
    """Of the first fused layer, from the operator's arguments, both attentions written out."""
    model, processor = loaded
    calls = []
    operator = fusion.adaptive_fusion_attention
    monkeypatch.setattr(
        fusion,
        "adaptive_fusion_attention",
        lambda *args, **kwargs: calls.append(args) or operator(*args, **kwargs),
    )
    with branch_ratios() as ratios, torch.no_grad():
        model(**processor(texts["en"][0]))
    q, k, v, cross_k, cross_v, gate = (part.double() for part in calls[0])
    heads = q.shape[1] // k.shape[1]
    k, v, cross_k, cross_v = (part.repeat_interleave(heads, 1) for part in (k, v, cross_k, cross_v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    own = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    crossing = gate * ((q @ cross_k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ cross_v)
    norms = [part.transpose(1, 2).flatten(2).norm(dim=-1) for part in (crossing, own)]
    assert ratios[0].item() == pytest.approx((norms[0] / norms[1]).mean().item(), rel=1e-4)
    with pytest.raises(KeyError), branch_ratios():
        raise KeyError
    calls.clear()
    with torch.no_grad():
        model(**processor(texts["en"][0]))
    assert len(calls) == 2  # a layer one call again: nothing of the probe is left


def test_ratios_are_in_the_order_of_the_fused_layers(bases, texts):
    """As their gates and aligner weights are, which count layers as they were given."""
    pair = str(bases / "encoder"), str(bases / "llm")
    model = LayAlignForConditionalGeneration.from_bases(*pair, llm_layers=[1, 0]).eval()
    for name, parameter in model.trained_parameters():
        if "gate" in name:
            parameter.data.fill_(1.0 if ".1." in name else 0.01)
    ratio = joined_states(model, LayAlignProcessor.from_bases(*pair), texts["en"]).ratio
    assert model.config.fused_layers == [1, 0] and bool((ratio[0] > 10 * ratio[1]).all())


def test_sentences_to_translate_are_parallel_with_their_answers(tmp_path):
    """FLORES has its English ones there alone, as the target of all others."""
    flores101(tmp_path)
    found = parallel_texts("flores", tmp_path)
    assert list(found) == ["en", "sw", "zh"] and found["en"] == FLORES["eng"] and found["sw"] == FLORES["swh"]
    assert list(parallel_texts("flores", tmp_path, languages=["en", "sw"])) == ["en", "sw"]


def written(path, texts):
    """The texts as a JSON-lines file of problems."""
    rows = [
        {"lang": lang, "question": text, "answer": place}
        for lang, part in texts.items()
        for place, text in enumerate(part)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_analysis_writes_its_folder(model_folder, texts, tmp_path, capsys):
    file = written(tmp_path / "questions.jsonl", texts)
    output = tmp_path / "out"
    results = analyze(model_folder, str(file), output=output, settings=CPU)
    assert "nearest" in capsys.readouterr().out
    names = {path.name for path in output.iterdir()}
    assert names == files_of(FIGURES | FUSED) | {"analysis.json", "table.md", "report.html"}
    assert results == json.loads((output / "analysis.json").read_text())
    assert results["texts"] == 4 and results["languages"] == ["en", "sw"]
    assert list(results["systems"]) == ["tiny", "LLM alone"]
    assert results["english"]["llm_alone"] == results["systems"]["LLM alone"]["english"]["llm"]
    assert (
        len(results["ratio"]["sw"]) == len(results["mix"]["keys"]) == 2
        and results["gates"] == [[pytest.approx(0.7)]] * 2
    )


def test_an_analysis_may_be_repeated_with_other_texts(model_folder, texts, tmp_path, undrawn):
    output = tmp_path / "out"
    folder = tmp_path / "texts"
    folder.mkdir()
    for lang, rows in texts.items():
        (folder / f"{lang}.txt").write_text("\n".join(rows) + "\n")
    one_by_one = replace(CPU, batch_size=1)
    assert analyze(model_folder, texts=folder, output=output, settings=one_by_one, progress=False)["texts"] == 4
    assert analyze(model_folder, texts=folder, limit=2, output=output, settings=CPU, progress=False)["texts"] == 2


@pytest.mark.parametrize(
    "settings", [{"aligner": None}, {"gate": "dynamic"}, {"gate": None}, {"adapter": None}, {"encoder_states": "mean"}]
)
def test_every_kind_of_model(settings, bases, texts, tmp_path, undrawn):
    """In a folder where another one's figures are: what this model has no figure of goes."""
    torch.manual_seed(1)
    model = LayAlignForConditionalGeneration.from_bases(str(bases / "encoder"), str(bases / "llm"), **settings)
    model.save_pretrained(tmp_path / "model")
    LayAlignProcessor.from_bases(str(bases / "encoder"), str(bases / "llm")).save_pretrained(tmp_path / "model")
    file = written(tmp_path / "questions.jsonl", texts)
    (tmp_path / "out").mkdir()
    for name in (*files_of(FUSED), "analysis.json"):
        (tmp_path / "out" / name).touch()
    results = analyze(tmp_path / "model", str(file), output=tmp_path / "out", settings=CPU, progress=False)
    figures = {path.name for path in (tmp_path / "out").iterdir() if path.suffix in (".png", ".svg", ".csv")}
    (setting,) = settings.items()
    missing = {("aligner", None): FUSED, ("gate", "dynamic"): {"gates"}, ("gate", None): {"gates"}}.get(setting, set())
    assert figures == files_of((FIGURES | FUSED) - missing)
    assert results["systems"]["model"]["without"].keys() == missing
    for reason in results["systems"]["model"]["without"].values():
        assert f"Not in this figure: model ({reason})." in (tmp_path / "out" / "report.html").read_text()
    # Gates begin at zero: the cross-attention adds nothing.
    if setting != ("gate", None):
        assert all(value == 0 for row in results.get("ratio", {}).values() for value in row)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"languages": ["sw"]}, r"got sw; takes English \(en\) and at least one other"),
        ({"languages": ["en"]}, "at least one other"),
        ({"limit": 1}, "got 1 texts that all of sw, en have, takes at least 2"),
        ({"languages": ["en", "de"]}, "languages: de not in"),
        ({"texts": "absent"}, "absent has no en.txt"),
        ({"output": "foreign"}, "holds no analysis"),
        ({"output": "foreign/file"}, "is a file, takes a folder"),
        ({"settings": replace(CPU, encoder_max_length=0)}, "encoder_max_length: got 0"),
    ],
)
def test_bad_analyses(change, message, model_folder, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").write_text("kept")
    file = written(tmp_path / "questions.jsonl", texts)
    arguments = {"task": str(file), "output": "out", "settings": CPU, "progress": False} | change
    with pytest.raises(ValueError, match=message):
        analyze(model_folder, **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "questions.jsonl"]


def test_files_of_different_lengths_are_refused(model_folder, tmp_path):
    (tmp_path / "en.txt").write_text("what is 3\nwhat is 4\n")
    (tmp_path / "sw.txt").write_text("ni 3\n")
    with pytest.raises(ValueError, match=r"different numbers of lines: \{'en': 2, 'sw': 1\}"):
        analyze(model_folder, texts=tmp_path, output=tmp_path / "out", settings=CPU, progress=False)
    (tmp_path / "sw.txt").write_text("ni 3\n\n")
    with pytest.raises(ValueError, match="sw, text 2: got ''"):
        analyze(model_folder, texts=tmp_path, output=tmp_path / "out", settings=CPU, progress=False)
    (tmp_path / "sw.txt").write_bytes(b"ni 3\n\xff\n")
    with pytest.raises(ValueError, match=r"sw.txt is not UTF-8 \(invalid start byte at byte 5\)"):
        analyze(model_folder, texts=tmp_path, output=tmp_path / "out", settings=CPU, progress=False)


def test_a_loaded_model_reads_its_own_template(model_folder, texts):
    model, processor = load_model(model_folder, device="cpu")
    with_prompt = joined_states(model, processor, texts["en"])
    without = joined_states(model, processor, texts["en"], prompt=None)
    assert torch.equal(with_prompt.encoder, without.encoder) and not torch.equal(with_prompt.llm, without.llm)
