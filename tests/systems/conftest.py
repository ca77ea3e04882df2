"""Tiny translators with random weights: one that is told languages (NLLB's classes), one that is not (T5's)."""

import pytest
import torch

from tests.conftest import NUMBERS, WORDS
from tests.tiny_models import word_tokenizer

LANGUAGES = ["eng_Latn", "swh_Latn", "tha_Thai", "deu_Latn"]


@pytest.fixture(scope="session")
def nllb(tmp_path_factory):
    """Folder of an NLLB that knows four languages and writes words of the tests' LLM."""
    from transformers import M2M100Config, M2M100ForConditionalGeneration, NllbTokenizer

    words = [f"▁{word}" for word in [*WORDS, *NUMBERS]]
    pieces = sorted({character for word in words for character in word}.difference(words))
    vocabulary = {piece: index for index, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *pieces, *words])}
    tokenizer = NllbTokenizer(vocab=vocabulary, merges=[], extra_special_tokens=LANGUAGES, src_lang="eng_Latn")
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = M2M100Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        init_std=0.5,
        tie_word_embeddings=False,
        **sizes,
        **heads,
        **special,
    )
    folder = tmp_path_factory.mktemp("translators") / "nllb"
    model = M2M100ForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "encoder_attn." in name:  # so that what is written depends on what is read, and not on the last word alone
            parameter.data.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    """Folder of a T5 over the words of the tests' LLM and those of a prefix."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = word_tokenizer([*WORDS, *NUMBERS, "translate", "to", "English", "Swahili", "Thai"], end_after_text=True)
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "initializer_factor": 20.0}
    special = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    folder = tmp_path_factory.mktemp("translators") / "t5"
    T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes, **special)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
