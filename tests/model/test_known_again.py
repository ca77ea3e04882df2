"""Bases and trained parts are what they were when the model was saved, or refused; no code of theirs runs."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from layalign import LayAlignForConditionalGeneration, LayAlignProcessor
from layalign.base_samples import check_finite, differing, sample
from layalign.loading import load_encoder, load_llm, load_tokenizer
from layalign.systems.folders import causal_config
from layalign.trained_parts import read_trained

load = LayAlignForConditionalGeneration.from_pretrained
WEIGHTS = "model.safetensors"


@pytest.fixture
def saved(make_encoder, make_llm, tmp_path):
    """A folder with both bases and a model of them."""
    make_encoder().save_pretrained(tmp_path / "encoder")
    make_llm().save_pretrained(tmp_path / "llm")
    model = LayAlignForConditionalGeneration.from_bases(tmp_path / "encoder", tmp_path / "llm")
    model.save_pretrained(tmp_path / "model")
    return tmp_path


def another(module):
    """Of the same sizes."""
    torch.manual_seed(99)
    return type(module)(module.config)


@pytest.mark.parametrize("role", ["encoder", "llm"])
def test_another_base_of_equal_size_is_refused(role, saved, make_encoder, make_llm):
    other = another(make_encoder() if role == "encoder" else make_llm())
    with pytest.raises(ValueError, match=rf"{role} '.*' is not the one trained with: of \d+ tensors compared"):
        load(saved / "model", **{role: other})
    again = load(saved / "model", **{role: other}, check_bases=False)
    again.save_pretrained(saved / "again")  # now it is this one's
    load(saved / "again", **{role: other})
    other.save_pretrained(saved / role)
    with pytest.raises(ValueError, match=rf"{role} '.*{role}' is not the one trained with"):
        load(saved / "model")


def test_a_run_does_not_go_on_over_another_base(saved, make_encoder, make_llm):
    """What a checkpoint was trained on against what a resumed run has loaded."""
    model = LayAlignForConditionalGeneration.from_bases(saved / "encoder", saved / "llm")
    assert read_trained(saved / "model", model.config)
    other = LayAlignForConditionalGeneration.from_bases(saved / "encoder", another(make_llm()))
    with pytest.raises(ValueError, match=r"llm .* is not the one trained with"):
        read_trained(saved / "model", other.config)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_base_is_known_in_every_dtype(dtype, saved, make_llm):
    half = load(saved / "model", dtype=dtype)
    half.save_pretrained(saved / "half")
    again = load(saved / "half", dtype="float32")
    again.save_pretrained(saved / "again")
    load(saved / "again", dtype="bfloat16")
    llm = make_llm().to(getattr(torch, dtype))
    assert sample(llm) and not differing(sample(make_llm()), sample(llm))
    with torch.no_grad():
        for own in llm.parameters():
            own *= 1.05
    assert differing(sample(make_llm()), sample(llm))


def test_what_is_no_weight_of_the_base_is_no_part_of_a_sample(make_model):
    model = make_model()
    before = sample(model.llm)
    with torch.no_grad():
        for _, own in model.trained_parameters():
            own += 1
    assert sample(model.llm) == before
    assert sample(model.llm.to("meta")) == {}


def test_a_flipped_byte_shows_by_the_manifest(saved):
    folder = saved / "model"
    content = (folder / WEIGHTS).read_bytes()
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"files": {WEIGHTS: entry}}))
    model = load(folder)
    damaged = bytearray(content)
    damaged[-7] ^= 1
    (folder / WEIGHTS).write_bytes(damaged)
    with pytest.raises(
        ValueError,
        match=r"model\.safetensors is damaged \(its hash is not the manifest's\); restore it, or remove manifest",
    ):
        load(folder)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match=r"manifest\.json is unreadable"):
        load(folder)
    with torch.no_grad():
        model.adapter.boundary += 1
    model.save_pretrained(folder)  # the old manifest says nothing of the new file
    load(folder)


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (lambda x: x * torch.nan, "adapter.boundary holds NaN or Inf"),
        (lambda x: x / 0, "adapter.boundary holds NaN or Inf"),
        (lambda x: x.to(torch.complex64), "adapter.boundary is torch.complex64, takes floating point numbers"),
        (lambda x: x.bool(), "adapter.boundary is torch.bool"),
    ],
    ids=["nan", "inf", "complex", "bool"],
)
def test_a_trained_part_that_is_no_number(damaged, message, saved):
    file = saved / "model" / WEIGHTS
    weights = {name: value.clone() for name, value in load_file(file).items()}
    model = LayAlignForConditionalGeneration.from_bases(saved / "encoder", saved / "llm")
    model.save_published(saved / "published.bin")
    weights["adapter.boundary"] = damaged(weights["adapter.boundary"])
    save_file(weights, file)
    published = torch.load(saved / "published.bin", weights_only=True)
    published["mapping.end_boundary"] = damaged(published["mapping.end_boundary"])
    torch.save(published, saved / "published.bin")
    with pytest.raises(ValueError, match=message):
        load(saved / "model")
    with pytest.raises(ValueError, match=message):
        LayAlignForConditionalGeneration.from_published(
            saved / "published.bin", encoder=saved / "encoder", llm=saved / "llm"
        )


@pytest.mark.parametrize(("role", "value"), [("encoder", torch.nan), ("llm", torch.inf)])
def test_a_base_with_a_weight_that_is_no_number(role, value, saved):
    file = saved / role / WEIGHTS
    weights = load_file(file)
    name = min(weights, key=lambda name: weights[name].numel())
    weights[name].view(-1)[-1] = value
    save_file(weights, file, metadata={"format": "pt"})
    message = rf"{role} '.*{role}': \S*{name} holds NaN or Inf as float32; its weights are damaged"
    with pytest.raises(ValueError, match=message):
        load(saved / "model")
    with pytest.raises(ValueError, match=message):
        LayAlignForConditionalGeneration.from_bases(saved / "encoder", saved / "llm")
    model = load(saved / "model", check_bases=False)
    assert not all(own.isfinite().all() for own in model.parameters())
    LayAlignForConditionalGeneration.from_bases(saved / "encoder", saved / "llm", check_bases=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_is_looked_at(dtype):
    base = torch.nn.ParameterDict({"a": torch.randn(9, 40).to(dtype).T, "b": torch.randn(77).to(dtype)})
    base["none"] = torch.nn.Parameter(torch.empty(0, 3, dtype=dtype))
    base["whole"] = torch.nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    with torch.no_grad():
        base["a"][0, 0] = torch.finfo(dtype).max
        check_finite("llm", "folder", base)
        for name, own in (("a", base["a"]), ("b", base["b"])):
            for place in {0, 1, own.numel() // 2, own.numel() - 1}:
                where = (place,) if own.dim() == 1 else divmod(place, own.shape[1])
                for value in (torch.nan, torch.inf, -torch.inf):
                    before, own[where] = own[where].item(), value
                    with pytest.raises(ValueError, match=rf"llm 'folder': {name} holds NaN or Inf"):
                        check_finite("llm", "folder", base)
                    own[where] = before
    check_finite("llm", "folder", base)


def test_a_base_that_its_dtype_does_not_hold(saved):
    weights = load_file(saved / "llm" / WEIGHTS)
    name = min(weights)
    weights[name] = weights[name].double().mul(1e30).float()
    save_file(weights, saved / "llm" / WEIGHTS, metadata={"format": "pt"})
    load_llm(str(saved / "llm"))
    with pytest.raises(ValueError, match=r"holds NaN or Inf as float16; its weights are damaged or too large for that"):
        load_llm(str(saved / "llm"), torch.float16)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "shape", "folder"])
@pytest.mark.parametrize("role", ["encoder", "llm"])
def test_damaged_bases(role, damage, saved):
    file = saved / role / WEIGHTS
    if damage == "shape":
        weights = {name: value[:1].clone() for name, value in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    elif damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        content = file.read_bytes()
        file.write_bytes({"cut": content[:-100], "empty": b"", "text": b"weights"}[damage])
    with pytest.raises(ValueError, match=rf"{role} '.*{role}' cannot be loaded"):
        load(saved / "model")


def test_code_of_a_base_does_not_run_and_nobody_is_asked(saved, monkeypatch):
    """transformers asks on stdin where nothing is said, and a "y" in a pipe would run it."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    folder, ran = saved / "foreign", saved / "ran"
    folder.mkdir()
    classes = {"AutoConfig": "code.C", "AutoModel": "code.M", "AutoModelForCausalLM": "code.M"}
    (folder / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": classes}))
    tokenizer = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\nclass M: pass\nclass T: pass\n")
    name = str(folder)
    for call in (
        lambda: load_encoder(name),
        lambda: load_llm(name),
        lambda: LayAlignForConditionalGeneration.from_bases(saved / "encoder", name),
        lambda: load(saved / "model", llm=name),
        lambda: LayAlignProcessor.from_bases(name, name),
        lambda: load_tokenizer("llm", name),
        lambda: causal_config("llm", name),
    ):
        with pytest.raises(ValueError, match="custom code"):
            call()
    assert not asked and not ran.exists()
