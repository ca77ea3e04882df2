"""Malformed input to the model, its files and its processor: a clear error each time, and nothing is lost."""

import json

import pytest
import torch
import transformers
from torch import nn

from layalign import LayAlignConfig, LayAlignForConditionalGeneration, LayAlignProcessor
from layalign.loading import encoder_half, resolve


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aligner": "conv"}, r"aligner must be one of \('linear', 'mlp', None\), got 'conv'"),
        ({"adapter": "transformer"}, "adapter must be one of"),
        ({"gate": "tanh"}, "gate must be one of"),
        ({"attention_backend": "cuda"}, "attention_backend must be one of"),
        ({"encoder_states": "first"}, "encoder_states must be one of"),
        ({"encoder_states": [0, 9]}, r"distinct indices from 0 to 3 .*got \[0, 9\]"),
        ({"encoder_layers": [1, 1]}, "distinct indices"),
        ({"encoder_states": []}, "encoder_states must be distinct indices"),
        ({"llm_layers": [2]}, r"llm_layers must be distinct indices from 0 to 1"),
        ({"llm_layers": ["0"]}, "llm_layers must be distinct indices"),
        ({"llm_layers": []}, "llm_layers: empty, .* aligner=None leaves it out"),
        ({"llm_layers": [0], "aligner": None}, r"llm_layers: got \[0\], .* aligner is None"),
        ({"encoder_layers": [0], "aligner": None}, "encoder_layers: got .* aligner is None"),
        ({"gate": "dynamic", "aligner": None}, "gate: got 'dynamic', .* aligner is None"),
        ({"llm_input": {"translate": True}}, "llm_input takes"),
        ({"llm_input": {"task": "yes"}}, "llm_input takes"),
        ({"llm_layers": 0}, "llm_layers must be a list of indices or None, got 0"),
        ({"llm_layers": [True]}, "llm_layers must be distinct indices"),
        ({"llm_input": "task"}, "llm_input takes"),
        ({"mask_cross_padding": "no"}, "mask_cross_padding must be true or false, got 'no'"),
        ({"published_training": "no"}, "published_training must be true or false"),
        ({"fold_at_inference": 1}, "fold_at_inference must be true or false"),
        ({"adapter": None, "aligner": None}, "both None"),
        ({"gates": "scalar"}, "from_bases does not take"),
        ({"alinger": "linear"}, "from_bases does not take"),
    ],
)
def test_settings(settings, message, make_encoder, make_llm):
    with pytest.raises(ValueError, match=message):
        LayAlignForConditionalGeneration.from_bases(make_encoder(), make_llm(), **settings)


def test_bases(make_encoder, make_llm, tmp_path):
    join = LayAlignForConditionalGeneration.from_bases
    with pytest.raises(ValueError, match="no base called 'layalign:huge' ships"):
        resolve("layalign:huge")
    with pytest.raises(ValueError, match="neither a folder"):
        join(tmp_path / "absent", make_llm())
    with pytest.raises(ValueError, match="encoder must be"):
        join(nn.Linear(2, 2), make_llm())
    with pytest.raises(ValueError, match="llm must be a transformers causal language model"):
        join(make_encoder(), make_llm().model)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ValueError, match=r"config\.json|neither"):
        join(make_encoder(), tmp_path)
    with pytest.raises(ValueError, match="needs encoder_config"):
        LayAlignForConditionalGeneration(LayAlignConfig())
    with pytest.raises(ValueError, match="encoder_config must be a transformers config"):
        LayAlignConfig(encoder_config={"hidden_size": 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_input_ids": None}, "encoder_input_ids is missing"),
        ({"encoder_input_ids": torch.zeros(3, 6)}, "encoder_input_ids must be .*float32"),
        ({"encoder_input_ids": torch.zeros(6, dtype=torch.long)}, r"encoder_input_ids must be .*\(6,\)"),
        (
            {"encoder_attention_mask": torch.ones(3, 5)},
            r"mask of encoder_input_ids must have its shape \(3, 6\), got \(3, 5\)",
        ),
        ({"attention_mask": torch.ones(2, 7)}, "mask of input_ids must have its shape"),
        (
            {"input_ids": torch.ones(2, 7, dtype=torch.long), "attention_mask": None},
            "input_ids has 2 rows, encoder_input_ids 3",
        ),
        (
            {"labels": torch.ones(3, 6, dtype=torch.long)},
            r"labels must have the shape of input_ids, got \(3, 6\) for \(3, 7\)",
        ),
        (
            {"input_ids": None, "attention_mask": None, "labels": torch.ones(3, 6, dtype=torch.long)},
            "labels must have the shape",
        ),
        ({"inputs_embeds": torch.zeros(3, 2, 32)}, "encoder_input_ids starts a new sequence"),
        (
            {"encoder_mask": torch.ones(3, 6)},
            "encoder_mask: no such input; takes encoder_input_ids, encoder_attention_mask",
        ),
        ({"encoder_input_ids": torch.full((3, 6), 99)}, "encoder_input_ids holds token 99, the vocabulary has 50"),
        ({"input_ids": torch.full((3, 7), -1)}, "input_ids holds token -1"),
        (
            {"labels": torch.full((3, 7), -1)},
            "labels holds -1, takes tokens from 0 to 59, and -100 where there is no loss",
        ),
        ({"labels": torch.full((3, 7), 60)}, "labels holds 60"),
        ({"labels": torch.ones(3, 7)}, "labels must be token ids of int64 or int32, got torch.float32"),
        (
            {"encoder_input_ids": torch.zeros(0, 6).long(), "encoder_attention_mask": None},
            "encoder_input_ids holds no rows",
        ),
    ],
)
def test_forward(change, message, make_model, batch):
    for model in (make_model(), make_model().train()):
        with pytest.raises(ValueError, match=message):
            model(**batch | change)


def test_questions_without_a_token(make_model, batch):
    """They are read as they are beside others, as padding alone; labels may be int32."""
    model = make_model()
    padding = batch | {"encoder_attention_mask": torch.zeros(3, 6)}
    empty = batch | {"encoder_input_ids": torch.zeros(3, 0).long(), "encoder_attention_mask": None}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert model(**empty, labels=labels.int()).loss == model(**padding, labels=labels).loss
    found, expected = (model.generate(**given, max_new_tokens=3) for given in (empty, padding))
    assert torch.equal(found, expected)


def test_generate(make_model, batch):
    model = make_model()
    with pytest.raises(ValueError, match="encoder_input_ids"):
        model.generate(batch["input_ids"])
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(**batch, max_new_token=3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no folder", "holds no LayAlign model"),
        ("no config", "holds no LayAlign model"),
        ("config is text", r"config\.json: not JSON"),
        ("other model", "holds a 'llama' model"),
        ("no weights", "has no model.safetensors"),
        ("truncated weights", "damaged or no safetensors"),
        ("weights are text", "damaged or no safetensors"),
        ("weights miss a tensor", r"missing \['adapter.boundary'\]"),
        ("weights have one too many", r"unexpected \['surplus'\]"),
        ("weights of another shape", "adapter.boundary has shape"),
        ("other encoder", "encoder .* is not the one trained with: .*hidden_size 48 instead of 24"),
        ("other llm", "llm .* is not the one trained with: num_hidden_layers 3 instead of 2"),
        ("base is gone", "neither a folder"),
        ("no reference", "does not say where its encoder comes from"),
    ],
)
def test_saved_models(damage, message, make_encoder, make_llm, tmp_path):
    from safetensors.torch import load_file, save_file

    encoder, llm = make_encoder(), make_llm()
    for name, base in (("encoder", encoder), ("llm", llm)):
        base.save_pretrained(tmp_path / name)
    model = LayAlignForConditionalGeneration.from_bases(tmp_path / "encoder", tmp_path / "llm")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    settings = json.loads(config.read_text())
    tensors = load_file(weights)
    arguments = {}
    if damage == "no folder":
        folder = tmp_path / "absent"
    elif damage == "no config":
        config.unlink()
    elif damage == "config is text":
        config.write_text("model")
    elif damage == "other model":
        folder = tmp_path / "llm"
    elif damage == "no weights":
        weights.unlink()
    elif damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "weights are text":
        weights.write_text("weights")
    elif damage == "weights miss a tensor":
        del tensors["adapter.boundary"]
        save_file(tensors, weights)
    elif damage == "weights have one too many":
        save_file(tensors | {"surplus": torch.zeros(1)}, weights)
    elif damage == "weights of another shape":
        save_file(tensors | {"adapter.boundary": torch.zeros(3)}, weights)
    elif damage == "other encoder":
        settings_of_other = encoder.config.to_dict() | {"d_model": 48}
        arguments["encoder"] = type(encoder)(type(encoder.config)(**settings_of_other))
    elif damage == "other llm":
        arguments["llm"] = type(llm)(type(llm.config)(**llm.config.to_dict() | {"num_hidden_layers": 3}))
    elif damage == "base is gone":
        (tmp_path / "llm" / "config.json").unlink()
    elif damage == "no reference":
        config.write_text(json.dumps(settings | {"encoder_name_or_path": None}))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        LayAlignForConditionalGeneration.from_pretrained(folder, **arguments)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_processor(words, tmp_path):
    llm, encoder = words(["a", "b"]), words(["c", "d"], eos=True)
    with pytest.raises(ValueError, match=r"a text that contains \{text\} once"):
        LayAlignProcessor(llm, encoder, prompt_template="Question:")
    processor = LayAlignProcessor(llm, encoder)
    for arguments, message in (
        ({"text": []}, "text is empty"),
        ({"text": 3}, "text must be a text or a list of texts"),
        ({"text": ["c", 4]}, "text must be a text or a list of texts"),
        ({"text": ["c", "d"], "prompt": ["a"]}, "prompt has 1 texts for 2 questions"),
        ({"text": "c", "target": ["a", "b"]}, "target has 2 texts for 1 questions"),
        ({"text": "c", "return_tensors": "np"}, "return_tensors must be 'pt'"),
        ({"text": "c", "padding_side": "middle"}, "padding_side must be"),
        ({"text": "c", "max_length": 0}, "max_length must be a positive number of tokens or None, got 0"),
        ({"text": "c", "encoder_max_length": -1}, "encoder_max_length must be a positive number of tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(**arguments)
    with pytest.raises(ValueError, match="no processor"):
        LayAlignProcessor.from_pretrained(tmp_path / "absent")


def test_a_base_without_its_weights_is_refused(make_encoder, make_llm, tmp_path):
    """Half an encoder, saved on its own, has other names: transformers would fill the whole with random weights."""
    encoder_half(make_encoder()).save_pretrained(tmp_path / "half")
    with pytest.raises(
        ValueError, match=r"encoder '.*half' does not hold all weights of a MT5EncoderModel: missing .+ more"
    ):
        LayAlignForConditionalGeneration.from_bases(str(tmp_path / "half"), make_llm())


@pytest.mark.parametrize(
    ("family", "settings", "limit"),
    [
        ("Bert", {}, 7),
        ("XLMRoberta", {}, 5),  # its positions count from the one behind padding's, 1
        (
            "Bart",
            {
                "encoder_layers": 1,
                "decoder_layers": 1,
                "encoder_ffn_dim": 16,
                "decoder_attention_heads": 2,
                "d_model": 24,
            },
            7,
        ),
        ("GPT2", {"n_positions": 7}, 7),
        ("T5", {"d_model": 24, "d_kv": 8, "d_ff": 16}, None),
        ("Qwen2", {"num_key_value_heads": 1}, None),
    ],
)
def test_no_more_tokens_than_the_encoder_has_positions(family, settings, limit, make_llm):
    """A CPU raised an IndexError from inside the encoder, a GPU an assertion that ends the process."""
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "encoder_attention_heads": 2, "max_position_embeddings": 7, "pad_token_id": 1}
    sizes = {name: value for name, value in sizes.items() if not (name == "hidden_size" and "d_model" in settings)}
    encoder = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**sizes | settings))
    model = LayAlignForConditionalGeneration.from_bases(encoder.eval(), make_llm())
    assert model.encoder_limit == limit
    model.encode(torch.full((1, limit or 9), 5))
    # Padding counts for nothing.
    padded = torch.full((1, 12), 5)
    model.encode(padded, (torch.arange(12) < 5)[None].long())
    if limit is not None:
        with pytest.raises(ValueError, match=f"{limit + 1} tokens in a row, the encoder takes {limit}"):
            model.encode(torch.full((1, limit + 1), 5))
