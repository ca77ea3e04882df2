import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from layalign.train.demo.real import smollm2


def test_every_weight_reaches_its_place(converted):
    folder, weights = converted["llm"]
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert set(state) == {*weights, "lm_head.weight"}
    for name, weight in weights.items():
        assert torch.equal(state[name], torch.tensor(weight)), name
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])


def test_configuration(converted):
    model = AutoModelForCausalLM.from_pretrained(converted["llm"][0])
    assert (model.config.model_type, model.config.num_key_value_heads, model.config.rms_norm_eps) == ("llama", 2, 1e-5)
    assert model.config.rope_parameters["rope_theta"] == 1e5
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)


def test_tokenizer(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted["llm"][0])
    assert tokenizer.tokenize("hello a12") == ["hell", "o", "\u0120a", "1", "2"]
    text = "<|im_start|>h\u00e9 \u4e2d\n 42<|im_end|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer(text).input_ids[0] == tokenizer.bos_token_id == 1
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert chat == "<|im_start|>a<|im_end|>"


def test_truncated_file(tmp_path, miniature):
    miniature.write_gguf(tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 2, 10, 1000, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf: not a whole GGUF file"):
            smollm2.convert(cut, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma"}, "architecture 'gemma'"),
        ({"pre": "llama-bpe"}, "tokenizer gpt2/llama-bpe"),
        ({"leave_out": ("blk.1.attn_k.weight",)}, "19 tensors, expected 20"),
    ],
    ids=["architecture", "tokenizer", "missing tensor"],
)
def test_wrong_files_are_named(tmp_path, changes, message, miniature):
    miniature.write_gguf(tmp_path / "model.gguf", **changes)
    with pytest.raises(ValueError, match=message):
        smollm2.convert(tmp_path / "model.gguf", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
