"""Several models side by side: labels, numbers of each by itself, the page and its data; and what the command line refuses."""

import base64
import csv
import json
import math
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from layalign import LayAlignForConditionalGeneration, LayAlignProcessor, fusion
from layalign.analysis import run as analysis_run
from layalign.analysis.data import HEADERS, encoders
from layalign.analysis.run import analyze
from layalign.cli import app
from layalign.evaluation.settings import GenerationSettings
from layalign.loading import load_llm, load_model, load_tokenizer
from layalign.systems import LLM, LayAlignModel, System
from layalign.systems.labels import labels

CPU = GenerationSettings(device="cpu", batch_size=1)
TEXTS = {
    "en": ["what is 3 plus 4", "how many apples and 5", "what is 9 and 2 so"],
    "sw": ["ni ngapi 3 na 4", "tufaha ngapi na 5", "ni 9 na 2 so ngapi"],
}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bases, model_folder):
    """Models: tiny in a and in b, whose gates differ, one without aligner, one without gates; and texts."""
    folder = tmp_path_factory.mktemp("several")
    shutil.copytree(model_folder, folder / "a" / "tiny")
    for name, settings in {"b/tiny": {"gate": "head"}, "bare": {"aligner": None}, "open": {"gate": None}}.items():
        torch.manual_seed(2)
        model = LayAlignForConditionalGeneration.from_bases(str(bases / "encoder"), str(bases / "llm"), **settings)
        for part, parameter in model.trained_parameters():
            if "gate" in part:
                parameter.data.uniform_(-1, 1)
        model.save_pretrained(folder / name)
        processor = LayAlignProcessor.from_bases(str(bases / "encoder"), str(bases / "llm"), "{text}")
        processor.save_pretrained(folder / name)
    (folder / "texts").mkdir()
    for lang, rows in TEXTS.items():
        (folder / "texts" / f"{lang}.txt").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def several(folder, bases):
    """Results of all of them and of their LLM, which is given too, and the folder they are written in."""
    places = [folder / name for name in ("a/tiny", "b/tiny", "bare", "open")]
    output = folder / "out"
    return analyze(
        [*places, bases / "llm"], texts=folder / "texts", output=output, settings=CPU, progress=False
    ), output


def test_models_are_told_apart_and_each_llm_is_read_once(several, bases):
    results, _ = several
    systems = results["systems"]
    assert list(systems) == ["tiny in a", "tiny in b", "bare", "open", "llm alone, tiny in a's prompt", "llm alone"]
    assert {systems[name]["place"] for name in list(systems)[4:]} == {str(bases / "llm")}
    assert [systems[name]["run"]["prompt"] for name in list(systems)[4:]] == ["question {text} answer", None]
    assert systems["bare"]["without"] == dict.fromkeys(("ratio", "aligner", "gates"), "no aligner")
    assert systems["open"]["without"] == {"gates": "no gates (gate: none)"}
    assert systems["bare"]["trained"].keys() == {"adapter"}
    assert list(encoders(systems)) == ["encoder"], "all four have the same one"
    assert "english" not in results, "of no single model"


def test_a_single_models_llm_is_its_own(folder, bases, undrawn, tmp_path):
    """Whatever other LLM is read before it."""
    llm = load_llm(str(bases / "llm"))
    torch.nn.init.normal_(llm.get_input_embeddings().weight)
    llm.save_pretrained(tmp_path / "other")
    load_tokenizer("llm", str(bases / "llm")).save_pretrained(tmp_path / "other")
    given = {"texts": folder / "texts", "settings": CPU, "progress": False}
    alone = analyze(folder / "a" / "tiny", output=tmp_path / "alone", **given)
    results = analyze([tmp_path / "other", folder / "a" / "tiny"], output=tmp_path / "both", **given)
    assert results["english"] == alone["english"]
    other, own = (one["english"]["llm"] for one in results["systems"].values() if one["kind"] == "LLM alone")
    assert results["english"]["llm_alone"] == own != other


@pytest.mark.parametrize("name", ["a/tiny", "b/tiny", "open"])
def test_the_ratio_of_each_is_that_of_its_own_branches(name, several, folder, monkeypatch):
    """Mean over texts and tokens, both attentions written out from the operator's arguments, layer by layer."""
    model, processor = load_model(folder / name, device="cpu")
    operator, calls = fusion.adaptive_fusion_attention, []
    monkeypatch.setattr(
        fusion, "adaptive_fusion_attention", lambda *given, **other: calls.append(given) or operator(*given, **other)
    )
    expected = [[], []]
    for text in TEXTS["sw"]:
        calls.clear()
        with torch.no_grad():
            model(**processor(text))
        for layer, call in enumerate(calls):
            q, k, v, cross_k, cross_v, gate = (part.double() for part in call)
            k, v, cross_k, cross_v = (
                part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v, cross_k, cross_v)
            )
            future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
            own = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -torch.inf).softmax(-1) @ v
            crossing = gate.view(1, -1, 1, 1) * ((q @ cross_k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ cross_v)
            ratio = [part.transpose(1, 2).flatten(2).norm(dim=-1) for part in (crossing, own)]
            expected[layer].append((ratio[0] / ratio[1]).mean().item())
    label = "open" if name == "open" else f"tiny in {name[0]}"
    found = several[0]["systems"][label]["ratio"]["sw"]
    assert found == pytest.approx([sum(layer) / len(layer) for layer in expected], rel=1e-4)


def test_side_by_side_is_as_alone(several, folder, undrawn, tmp_path):
    alone = analyze(folder / "b" / "tiny", texts=folder / "texts", output=tmp_path / "x", settings=CPU, progress=False)
    assert alone["systems"]["tiny"] == several[0]["systems"]["tiny in b"]
    assert alone["systems"]["LLM alone"] == several[0]["systems"]["llm alone"]


def rebuilt(rows, keys, value=-1):
    """{(cells of the keys' columns): a number}"""
    return {tuple(row[key] for key in keys): float(row[value]) for row in rows}


def test_the_data_of_each_figure_is_that_of_the_results(several):
    """Each number once, none of them rounded."""
    results, output = several
    rows = {}
    for name, header in HEADERS.items():
        with (output / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            first, *rows[name] = csv.reader(file)
        assert tuple(first) == header
    expected = {name: {} for name in HEADERS}
    for system, found in results["systems"].items():
        for reader, languages in found["english"].items():
            expected["english"] |= {(system, reader, lang): one["found"] for lang, one in languages.items()}
        for lang, points in found["components"]["llm"]["points"].items():
            expected["components"] |= {(system, lang, str(text)): point[1] for text, point in enumerate(points)}
        for lang, ratios in found.get("ratio", {}).items():
            expected["ratio"] |= {(system, lang, str(layer)): ratio for layer, ratio in enumerate(ratios)}
        for part, mix in found.get("mix", {}).items():
            for layer, weights in enumerate(mix):
                states = zip(found["mixed_states"], weights, strict=True)
                expected["aligner"] |= {(system, part, str(layer), str(state)): weight for state, weight in states}
        for layer, heads in enumerate(found.get("gates") or ()):
            expected["gates"] |= {(system, str(layer), str(head)): gate for head, gate in enumerate(heads)}
    found = results["systems"]["open"]
    for state, cosines in enumerate(found["encoder_layers"]["similarity"]):
        expected["encoder_layers"] |= {
            ("encoder", str(state), str(other)): cosine for other, cosine in enumerate(cosines)
        }
    nearest = found["encoder_layers"]["english"]["sw"]["found"]
    expected["encoder_english"] = {("encoder", "sw", str(state)): value for state, value in enumerate(nearest)}
    for layer, cosines in zip(found["tokens"]["layers"], found["tokens"]["cosine"], strict=True):
        for row, line in enumerate(cosines, 1):
            for column, cosine in enumerate(line, 1):
                expected["tokens"]["encoder", str(layer), str(row), str(column)] = cosine
    for name, numbers in expected.items():
        keys = range(len(next(iter(numbers))))
        keys = (0, 1, 2, 4) if name == "tokens" else keys
        column = 4 if name == "components" else -1
        assert numbers and rebuilt(rows[name], keys, column) == numbers, name


class Page(HTMLParser):
    """Tags, pictures, and what is wrong with them: not closed, or something that a browser would fetch or run."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.wrong, self.texts, self._open = [], [], [], [], []
        self.feed(text)
        self.close()
        self.wrong += self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self._open.append(tag)
        for name, value in attrs:
            inside = tag == "img" and name == "src" and value.startswith("data:image/svg+xml;base64,")
            if (name in ("src", "href", "srcset", "action") and not inside) or name.startswith("on"):
                self.wrong.append((tag, name, value))
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.wrong.append(f"closed: {tag}")

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_needs_nothing_else(several):
    results, output = several
    text = (output / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.wrong == [] and not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "http" not in text and "@import" not in text and "url(" not in text
    assert len(page.images) == len(HEADERS)
    for image in page.images:
        drawing = base64.b64decode(image["src"].partition(",")[2])
        for node in ElementTree.fromstring(drawing).iter():
            for name, value in node.attrib.items():
                if name.endswith("href"):
                    assert value.startswith(("#", "data:")), value
        assert image["alt"].strip()
    shown = " ".join(page.texts)
    same = [one["same"] for one in results["systems"]["open"]["english"]["llm"].values()]
    assert f"open: {min(same):.2f} to {max(same):.2f}" in page.images[0]["alt"]
    for word in ("tiny in a", "tiny in b", "Not in this figure: bare (no aligner).", "transformers", *TEXTS["sw"][:1]):
        assert word in shown
    assert "Not in this figure: bare (no aligner); " not in shown
    # The same results give the same page: nothing in it is of the hour.
    assert (output / "ratio.svg").read_bytes().count(b"<dc:date>") == 0


def test_hostile_names_and_texts_are_shown_as_they_are(folder, undrawn, tmp_path):
    name = '"><b onclick=x>&amp;'
    shutil.copytree(folder / "bare", tmp_path / name)
    pair = analysis_run.TokenPair(texts=(HOSTILE, "what is 3"))
    options = {"texts": folder / "texts", "output": tmp_path / "out", "settings": CPU, "progress": False}
    analyze(tmp_path / name, pair=pair, **options)
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert page.wrong == [] and "script" not in page.tags and "b" in page.tags
    assert HOSTILE in page.texts and f"Analysis of {name}" in page.texts


def test_a_published_baseline_is_read_as_its_settings_are(folder, bases, undrawn, tmp_path):
    """MindMerger's file of the mapping that a model without an aligner has, beside that model."""
    model, _ = load_model(folder / "bare", device="cpu")
    theirs = {"adapter.boundary": "end_boundary"}
    state = {
        theirs.get(name, name.replace("adapter.", "mlp.")): own for name, own in model.trained_state_dict().items()
    }
    torch.save({"model_state_dict": state}, tmp_path / "pytorch_model.bin")
    words = ["analyze", folder / "bare", "--published", f"mindmerger={tmp_path / 'pytorch_model.bin'}", "--encoder"]
    words += [bases / "encoder", "--llm", bases / "llm", "--texts", folder / "texts", "--device", "cpu"]
    words += ["--batch-size", "1", "--output", tmp_path / "out", "--pair", "3 plus 4", "4 na 3", "--pair-layers", "0,2"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    assert "bare: no aligner, so not in ratio, aligner, gates" in result.output
    systems = json.loads((tmp_path / "out" / "analysis.json").read_text())["systems"]
    bare, baseline, _ = systems.values()
    assert list(systems)[1:] == [f"mindmerger ({tmp_path.name})", "LLM alone"]
    for name in ("english", "components", "encoder_layers", "tokens", "trained", "without"):
        assert bare[name] == baseline[name]
    assert baseline["kind"] == "mindmerger" and baseline["tokens"]["layers"] == [0, 2]
    assert baseline["tokens"]["tokens"] == [["3", "plus", "4"], ["4", "na", "3"]]
    assert baseline["tokens"]["cosine"][0][0][2] == pytest.approx(1), "one word's embedding"


def test_an_llm_that_was_trained_is_not_its_base(folder, bases, undrawn, tmp_path):
    """Trained alone, in a model's folder without an encoder; read as any LLM is, beside a model over its base."""
    model = LayAlignForConditionalGeneration.from_bases(
        None, str(bases / "llm"), adapter=None, aligner=None, train_llm=True
    )
    with torch.no_grad():
        model.llm.lm_head.weight.mul_(2), model.llm.model.norm.weight.mul_(torch.linspace(-1, 1, 32))
    model.save_pretrained(tmp_path / "whole")
    LayAlignProcessor.from_bases(None, str(bases / "llm"), "{text}").save_pretrained(tmp_path / "whole")
    options = {"texts": folder / "texts", "output": tmp_path / "out", "settings": CPU, "progress": False}
    systems = analyze([tmp_path / "whole", folder / "bare"], **options)["systems"]
    assert list(systems) == ["bare", "LLM of whole", "llm alone"]
    assert systems["LLM of whole"]["english"] != systems["llm alone"]["english"]
    assert systems["LLM of whole"]["place"] == str(tmp_path / "whole")
    alone = analyze(bases / "llm", **options)
    assert alone["systems"] == {"llm alone": systems["llm alone"]}
    assert "Analysis of llm alone" in (tmp_path / "out" / "report.html").read_text()
    assert not (tmp_path / "out" / "ratio.svg").exists()


def test_labels():
    assert labels(["x", "y"], ["a/x", "b/y"]) == ["x", "y"]
    assert labels(["x", "x", "y"], ["org/x", "other/x", "y"]) == ["x in org", "x in other", "y"]
    assert labels(["x", "x", "x"], ["a/k/x", "b/k/x", "c/x"]) == ["x in a/k", "x in b/k", "x in c"]
    with pytest.raises(ValueError, match="models: got a/x twice"):
        labels(["x", "x"], ["a/x", "a/x"])


def test_models_are_called_as_they_are_to_be(folder, undrawn, tmp_path):
    words = [f"with an aligner={folder / 'a' / 'tiny'}", str(folder / "bare")]
    given = ["--texts", str(folder / "texts"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    result = CliRunner().invoke(app, ["analyze", *words, *given])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert list(found["systems"]) == ["with an aligner", "bare", "llm alone, with an aligner's prompt", "llm alone"]
    assert found["systems"]["with an aligner"]["place"] == str(folder / "a" / "tiny")


BAD = {
    "no model": ([], "models: got none"),
    "one twice": (["{folder}/open", "{folder}/../{name}/open"], "models: got .*open twice"),
    "a folder of something else": (["{folder}/texts"], "holds no model"),
    "a baseline of no kind": (["--published", "other=x"], "kind: got 'other', takes 'mindmerger' or 'langbridge'"),
    "a baseline of no place": (["--published", "mindmerger"], "takes mindmerger=CHECKPOINT or langbridge=FOLDER"),
    "a tokenizer without a baseline": (["{folder}/open", "--encoder-tokenizer", "x"], "goes with --published"),
    "layers that are no numbers": (["{folder}/open", "--pair-layers", "1,last"], "--pair-layers: got '1,last'"),
    "a layer too high": (["{folder}/open", "--pair-layers", "1,3"], "got 3; the encoder of open has 0, .*, to 2"),
    "a name twice": (["x={folder}/open", "x=layalign:tiny_llm"], "models: two are called x; NAME=FOLDER"),
    "an empty text": (["{folder}/open", "--pair", "what", " "], "pair: got 'what', ' '; takes two"),
    "three languages": (["{folder}/open", "--pair-languages", "sw,en,de"], "pair languages: got .*takes two"),
    "a language that is not there": (["{folder}/open", "--pair-languages", "sw,de"], "got de; the texts are in en, sw"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_is_named_and_nothing_written(case, folder, tmp_path, monkeypatch):
    words, message = BAD[case]
    monkeypatch.setattr(analysis_run, "_analyzed", None)  # before anything is loaded
    words = [word.format(folder=folder, name=folder.name) for word in words]
    given = ["--texts", str(folder / "texts"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["analyze", *words, *given])
    assert isinstance(result.exception, ValueError) and re.search(message, str(result.exception)), result.exception
    assert not (tmp_path / "out").exists()


class Steps(System):
    """A system without one model whose states could be looked at, as a translator before an LLM is."""

    name = "two steps"
    check = fingerprint = load = None


def test_systems_of_their_own_settings(folder, bases):
    model = LayAlignModel(model=str(folder / "open"), settings=CPU)
    with pytest.raises(ValueError, match="settings: a system has its own"):
        analyze(model, texts=folder / "texts", settings=CPU)
    with pytest.raises(ValueError, match="got two steps, a Steps; takes LayAlign models, LLMs and published baselines"):
        analyze([model, Steps()], texts=folder / "texts")
    kinds = [
        type(one)
        for one in analysis_run._systems([folder / "open", str(bases / "llm"), "layalign:tiny_llm"], CPU).values()
    ]
    assert kinds == [LayAlignModel, LLM, LLM]
