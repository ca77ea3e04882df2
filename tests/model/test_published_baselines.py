"""MindMerger's and LangBridge's checkpoints: what their public code computed with them comes out of LayAlign's model.

published_baselines/ was recorded by running the public code, unchanged, on a CPU (`torch.Tensor.cuda` did nothing), over tiny random
bases: `bases/` made with transformers 4.37.2 (an mT5 of 2 layers and width 16, a Llama of 2 layers and width 16, seed 0).

- github.com/kaistAI/LangBridge at 4f43fb2, transformers 4.37.2: for alignments linear and ffn `LangBridgeModel(config,
  random_init=False)`, four rows of the encoder's embeddings moved as training moves those of its added tokens, alignment drawn from
  seed 1; `save_pretrained(safe_serialization=False)`, as their trainer saves. langbridge.safetensors has the logits of two examples
  alone and of both in one padded batch with its loss, and ten greedy tokens for the encoder's input alone by their `generate`.
- github.com/CONE-MT/MindMerger at 9b955f9, transformers 4.38.2: `MindMerger(...)`, mapping drawn from seed 2, their `save_model`.
  mindmerger.safetensors has the logits of model_llm, each row's own and those of the padded batch, its attention mask, losses, and
  greedy tokens with and without a prompt.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from layalign import LayAlignForConditionalGeneration
from layalign.published_baselines import load_published, published_processor
from layalign.published_baselines.langbridge import LangBridge

HERE = Path(__file__).parent / "published_baselines"
ENCODER, LLM = str(HERE / "bases" / "toy-mt5"), str(HERE / "bases" / "meta-math" / "MetaMath-toy")
BASES = {"encoder": ENCODER, "llm": LLM}
QUESTIONS = torch.tensor([[5, 9, 7, 20, 1], [11, 3, 1, 0, 0]])
PROMPTS = torch.tensor([[8, 14, 4, 21], [2, 2, 6, 17]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
TARGETS = torch.tensor([[3, 5, 2], [2, 9, 2]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
WRITTEN = torch.tensor([[8, 14, 4, 21], [6, 17, 0, 0]])  # LangBridge's, without the beginning of sequence


def close(ours, theirs):
    return (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def cut(ids, row, mask=None):
    """One row (1, N) without its padding."""
    real = ids[row] != 0 if mask is None else mask[row].bool()
    return ids[row : row + 1][:, real]


@pytest.fixture(scope="module")
def mindmerger():
    return load_published("mindmerger", HERE / "mindmerger" / "pytorch_model.bin", **BASES), load_file(
        HERE / "mindmerger.safetensors"
    )


@pytest.fixture(scope="module", params=["linear", "ffn"])
def langbridge(request):
    """(model, their outputs)."""
    outputs = load_file(HERE / "langbridge.safetensors")
    own = {name.partition(".")[2]: value for name, value in outputs.items() if name.startswith(request.param)}
    return load_published("langbridge", HERE / f"langbridge_{request.param}", **BASES), own


def test_mindmerger_alone(mindmerger):
    model, theirs = mindmerger
    for row in range(2):
        ids = torch.cat([cut(PROMPTS[0], row, PROMPTS[1]), cut(TARGETS[0], row, TARGETS[1])], 1)
        labels = ids.clone()
        labels[:, : int(PROMPTS[1][row].sum())] = -100
        asked = {"encoder_input_ids": cut(QUESTIONS, row), "input_ids": ids}
        with torch.no_grad():
            assert close(model(**asked).logits[0], theirs[f"logits.{row}"])
            assert close(model(**asked, labels=labels).loss, theirs[f"loss.{row}"])


def test_mindmerger_together(mindmerger):
    """They pad texts on the left, so that nothing depends on the batch in their code either."""
    model, theirs = mindmerger
    ids, mask = (torch.cat(pair, 1) for pair in zip(PROMPTS, TARGETS, strict=True))
    labels = torch.cat([torch.full_like(PROMPTS[0], -100), TARGETS[0].masked_fill(TARGETS[1] == 0, -100)], 1)
    batch = {"encoder_input_ids": QUESTIONS, "encoder_attention_mask": QUESTIONS != 0, "input_ids": ids}
    with torch.no_grad():
        own = model(**batch, attention_mask=mask)
        assert torch.equal(own.attention_mask, theirs["mask.together"].bool())
        alone = torch.cat([theirs["logits.0"], theirs["logits.1"]])
        assert close(own.logits[own.attention_mask], alone)
        assert close(model(**batch, attention_mask=mask, labels=labels).loss, theirs["loss.together"])
    assert close(theirs["logits.together"][1, 5:], theirs["logits.1"])


def test_mindmerger_generates(mindmerger):
    model, theirs = mindmerger
    encoded = {"encoder_input_ids": QUESTIONS, "encoder_attention_mask": QUESTIONS != 0}
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    with_prompt = model.generate(**encoded, input_ids=PROMPTS[0], attention_mask=PROMPTS[1], **options)
    assert torch.equal(with_prompt, theirs["generated"])
    assert torch.equal(model.generate(**encoded, **options), theirs["generated.without_prompt"])


def test_langbridge_alone(langbridge):
    model, theirs = langbridge
    for row in range(2):
        with torch.no_grad():
            logits = model(encoder_input_ids=cut(QUESTIONS, row), input_ids=cut(WRITTEN, row)).logits[0]
        assert close(logits, theirs[f"alone.{row}"])
        asked = {"encoder_input_ids": cut(QUESTIONS, row)}
        ids = model.generate(**asked, max_new_tokens=10, do_sample=False, pad_token_id=0)
        assert torch.equal(ids[0], theirs[f"generated.{row}"])


def test_langbridge_together(langbridge):
    """In a padded batch their positions count the encoder's padding, so that a row is answered otherwise than alone; ours is not."""
    model, theirs = langbridge
    mask = {"encoder_attention_mask": QUESTIONS != 0, "attention_mask": WRITTEN != 0}
    with torch.no_grad():
        out = model(encoder_input_ids=QUESTIONS, input_ids=WRITTEN, **mask)
    assert close(out.logits[0], theirs["together"][0])
    assert close(out.logits[1][out.attention_mask[1]], theirs["alone.1"])
    assert not close(theirs["together"][1, 6:8], theirs["alone.1"][4:6])


@pytest.mark.parametrize("kind", ["linear", "ffn"])
def test_langbridge_is_saved_with_the_base_that_it_changed(kind, tmp_path):
    folder = HERE / f"langbridge_{kind}"
    model = load_published("langbridge", folder, **BASES, bases=tmp_path / "bases")
    assert [path.name for path in (tmp_path / "bases").iterdir()] == ["encoder"]
    model.save_pretrained(tmp_path / "saved")
    again = LayAlignForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert Path(again.config.llm_name_or_path) == Path(LLM).resolve()
    asked = {"encoder_input_ids": QUESTIONS[:1], "input_ids": WRITTEN[:1]}
    with torch.no_grad():
        assert torch.equal(again(**asked).logits, model(**asked).logits)
    with pytest.raises(ValueError, match=r"bases: .*encoder is not empty"):
        load_published("langbridge", folder, **BASES, bases=tmp_path / "bases")
    load_published("langbridge", folder, **BASES).save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match="does not say where its encoder comes from"):
        LayAlignForConditionalGeneration.from_pretrained(tmp_path / "without")


def test_mindmerger_is_saved_with_its_bases_names(tmp_path):
    model = load_published("mindmerger", HERE / "mindmerger", **BASES)
    model.save_pretrained(tmp_path)
    again = LayAlignForConditionalGeneration.from_pretrained(tmp_path)
    for (name, ours), (_, theirs) in zip(model.trained_parameters(), again.trained_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_langbridge_in_several_files(tmp_path):
    """As the large ones are published; safetensors keep one of the names of a tied weight."""
    whole = dict(LangBridge.read(HERE / "langbridge_linear").state)
    tied = {
        "lb.lm.embed_tokens.weight": "lb.embeddings.weight",
        "lb.enc.encoder.embed_tokens.weight": "lb.enc.shared.weight",
    }
    assert all(torch.equal(whole.pop(name), whole[other]) for name, other in tied.items())
    halves = {"a.safetensors": list(whole)[::2], "b.safetensors": list(whole)[1::2]}
    shutil.copy(HERE / "langbridge_linear" / "config.json", tmp_path)
    for file, names in halves.items():
        save_file({name: whole[name].clone() for name in names}, tmp_path / file)
    weight_map = {name: file for file, names in halves.items() for name in names}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    found = LangBridge.read(tmp_path).state
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    one, several = (load_published("langbridge", folder, **BASES) for folder in (HERE / "langbridge_linear", tmp_path))
    for (name, value), again in zip(one.state_dict().items(), several.state_dict().values(), strict=True):
        assert torch.equal(value, again), name
    for said, message in (
        ("no", r"index.json: not JSON"),
        ("{}", r"index.json: holds no weight_map of tensors' names to files"),
        (
            '{"weight_map": {"a": "../b.safetensors"}}',
            r"index.json: names a file outside its folder: \.\./b\.safetensors",
        ),
    ):
        index.write_text(said)
        with pytest.raises(ValueError, match=message):
            LangBridge.read(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"b.safetensors is missing, damaged or no safetensors file"):
        LangBridge.read(tmp_path)


def test_a_base_in_half_precision_is_the_same_one(tmp_path):
    checkpoint = LangBridge.read(HERE / "langbridge_linear")
    model = load_published("langbridge", HERE / "langbridge_linear", **BASES, dtype=torch.bfloat16)
    assert not checkpoint.put_into("llm", model.llm)
    model.llm.lm_head.weight.data[0, 0] += 1
    assert checkpoint.put_into("llm", model.llm)


def edited(folder, tmp_path, change=None, **settings):
    """A copy of a LangBridge folder."""
    target = tmp_path / "edited"
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | settings
    (target / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value is not None})
    )
    if change is not None:
        state = torch.load(target / "pytorch_model.bin")
        change(state)
        torch.save(state, target / "pytorch_model.bin")
    return target


def drop(*names):
    return lambda state: [state.pop(name) for name in names]


def resize(name, *shape):
    return lambda state: state.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (
            None,
            {"alignments": "latent"},
            r"config.json: alignments 'latent'; LayAlign's adapters are LangBridge's linear and",
        ),
        (None, {"enc": None}, r"config.json: not a LangBridge configuration, which names its bases as enc and lm"),
        (drop("lb.alignment.enc_eos"), {}, r"edited: no tensor enc_eos; it has linear.bias, linear.weight"),
        (drop("lb.alignment.linear.bias"), {}, r"does not fit this model: missing \['adapter.linear2.bias'\]"),
        (resize("lb.alignment.enc_eos", 8), {}, r"adapter.boundary has shape \(8,\), the model needs \(16,\)"),
        (
            drop("lb.lm.norm.weight"),
            {},
            r"there is no lb.lm.norm.weight: it was trained on another llm than the given one",
        ),
        (
            resize("lb.lm_head.weight", 3, 4),
            {},
            r"shape \(3, 4\) instead of \(26, 16\) of lb.lm_head.weight: it was trained",
        ),
        (
            drop("lb.enc.encoder.final_layer_norm.weight"),
            {},
            r"there is no lb.enc.encoder.final_layer_norm.weight: it was",
        ),
        (lambda state: state.clear(), {}, r"not a LangBridge state dict \(no lb.alignment\)"),
        (
            lambda state: state.update(x=3),
            {},
            r"a state dict \(names to tensors\) was expected, got one of lb.alignment",
        ),
    ],
)
def test_langbridge_folders_that_are_none(tmp_path, change, settings, message):
    folder = edited(HERE / "langbridge_linear", tmp_path, change, **settings)
    with pytest.raises(ValueError, match=message):
        load_published("langbridge", folder, **BASES)


class Unsafe:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_what_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="kind: got 'layalign', takes 'mindmerger' or 'langbridge'"):
        load_published("layalign", HERE, **BASES)
    with pytest.raises(ValueError, match="encoder and llm: MindMerger's checkpoint holds the mapping alone"):
        load_published("mindmerger", HERE / "mindmerger", llm=LLM)
    with pytest.raises(ValueError, match="is no LangBridge folder"):
        load_published("langbridge", tmp_path)
    (tmp_path / "config.json").write_text('{"enc": "a", "lm": "b"}')
    with pytest.raises(ValueError, match="holds no weights"):
        load_published("langbridge", tmp_path, **BASES)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not JSON"):
        load_published("langbridge", tmp_path, **BASES)
    with pytest.raises(ValueError, match="encoder 'toy-mt5' is neither a model's folder nor one that can be fetched"):
        load_published("langbridge", HERE / "langbridge_linear", llm=LLM)  # the name in its config.json is not a place
    file = tmp_path / "pytorch_model.bin"
    with pytest.raises(ValueError, match="no file"):
        load_published("mindmerger", file, **BASES)
    torch.save({"model_state_dict": {"mlp.linear1.weight": Unsafe()}}, file)
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_published("mindmerger", file, **BASES)
    torch.save({"other": {}}, file)
    with pytest.raises(ValueError, match="a dict with 'model_state_dict' was expected, got one of other"):
        load_published("mindmerger", file, **BASES)
    torch.save({"model_state_dict": {"mlp.linear1.weight": torch.zeros(32, 16)}}, file)
    with pytest.raises(ValueError, match=r"no tensor mlp.linear2; it has mlp.linear1.weight"):
        load_published("mindmerger", file, **BASES)
    shutil.copy(HERE / "mindmerger" / "pytorch_model.bin", file)
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(ValueError, match="damaged"):
        load_published("mindmerger", file, **BASES)
    with pytest.raises(ValueError, match=r"llm: .* holds no tokenizer"):
        published_processor("mindmerger", HERE / "mindmerger", ENCODER, LLM)
