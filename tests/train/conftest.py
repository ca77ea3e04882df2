"""Tiny random bases with word-level tokenizers, and recipes over them."""

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, MT5Config, MT5EncoderModel, PreTrainedTokenizerFast

NUMBERS = ["sifuri", "moja", "mbili", "tatu", "nne", "tano", "sita", "saba", "nane", "tisa"]
WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "zero",
    "plus",
    "is",
    "translate",
    "answer",
    ":",
]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Folders of a tiny encoder and a tiny LLM with random weights."""
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    encoder_tokenizer = _tokenizer([*NUMBERS, *WORDS], eos_at_end=True)
    encoder = MT5EncoderModel(
        MT5Config(
            vocab_size=len(encoder_tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.1
        )
    )
    encoder.save_pretrained(root / "encoder")
    encoder_tokenizer.save_pretrained(root / "encoder")
    tokenizer = _tokenizer([*WORDS, *NUMBERS], eos_at_end=False)
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    llm.save_pretrained(root / "llm")
    tokenizer.save_pretrained(root / "llm")
    return {"encoder": str(root / "encoder"), "llm": str(root / "llm")}


@pytest.fixture
def records():
    """Ten records of unequal length that a tiny model can learn by heart."""
    english = ["zero", *WORDS[:9]]
    return [
        {
            "source": " ".join([NUMBERS[i], *NUMBERS[: i % 4]]),
            "target": f"{english[i]} plus {english[-i]}",
            "lang": "sw",
        }
        for i in range(10)
    ]


@pytest.fixture
def settings(bases, records, tmp_path):
    """Mapping of a recipe with both stages, in memory."""
    stage = {"data": {"records": records}, "steps": 6, "batch_size": 4, "learning_rate": 0.01, "log_steps": 1}
    return {
        **bases,
        "output": str(tmp_path / "run"),
        "progress": False,
        "device": "cpu",
        "stages": {"translation": dict(stage), "task": {**stage, "prompt": "answer : {source}"}},
    }


@pytest.fixture
def recipe_file(settings, tmp_path):
    """The same recipe as a YAML file, with its records in a JSON lines file."""
    import json

    data = tmp_path / "data.jsonl"
    records = settings["stages"]["task"]["data"]["records"]
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    for stage in settings["stages"].values():
        stage["data"] = {"format": "jsonl", "path": str(data)}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return file


def _tokenizer(words, eos_at_end):
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if eos_at_end:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
