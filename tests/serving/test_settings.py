"""What of a model's settings its server reads, without vLLM."""

import pytest
from transformers import BertConfig, LlamaConfig, MT5Config

from layalign.serving.settings import UNLIMITED, ServedConfig, checked_reading, longest_question

LLM = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MT5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
BERT = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def config_with(encoder, longest=None):
    config = ServedConfig(encoder_config=encoder, llm_config=LlamaConfig(**LLM))
    if longest is not None:
        config.update({"longest_question": longest})  # as vLLM does of --hf-overrides
    return config


ENCODERS = {"any number": MT5Config(**MT5), "512": BertConfig(**BERT, max_position_embeddings=512)}
CASES = {
    "any number": ("any number", None, 131_069, UNLIMITED),
    "a short sequence": ("any number", None, 2045, 2045),
    "asked for": ("any number", 8192, 131_069, 8192),
    "asked for, a short sequence": ("any number", 8192, 2045, 2045),
    "the encoder's": ("512", None, 131_069, 512),
    "shorter than the encoder's": ("512", 64, 131_069, 64),
}


@pytest.mark.parametrize("case", CASES)
def test_longest_question(case):
    encoder, given, room, expected = CASES[case]
    assert longest_question(config_with(ENCODERS[encoder], given), room) == expected


@pytest.mark.parametrize(
    ("encoder", "given", "said"),
    [("512", 513, "reads at most 512"), ("any number", 0, "got 0"), ("any number", "8192", "got '8192'")],
)
def test_longest_question_is_refused(encoder, given, said):
    with pytest.raises(ValueError, match=f"longest_question: .*{said}"):
        longest_question(config_with(ENCODERS[encoder], given), 2045)


def test_reading():
    assert checked_reading({}) == {}
    assert checked_reading({"lang": "sw", "encoder_max_length": None}) == {"lang": "sw"}
    for given, said in (
        ({"language": "sw", "lang": "sw"}, "takes lang, encoder_max_length, got language"),
        ({"lang": {"de": 1}}, "lang: got {'de': 1}, takes str"),
        ({"encoder_max_length": "5"}, "encoder_max_length: got '5', takes int"),
        ({"encoder_max_length": True}, "encoder_max_length: got True, takes int"),
    ):
        with pytest.raises(ValueError, match=f"^mm_processor_kwargs: {said}"):
            checked_reading(given)
