"""Recipes of one step over the shipped tiny bases in place of the paper's, and bases in place of those that rows name."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from layalign.evaluation.settings import GenerationSettings
from layalign.train.tables import runs
from layalign.train.tables.asking import Asking
from layalign.train.tables.runs import Sources
from tests.conftest import WORDS
from tests.tasks.originals import xcsqa_published, xnli_published
from tests.tiny_models import word_tokenizer

ENCODER, LLM = "layalign:tiny_encoder", "layalign:tiny_llm"
RECIPES = ("math", "math_english", "langbridge_english", "xcsqa", "xnli")
LANGUAGES = {"sw": "Musa ana matufaha 2.", "de": "Anna hat 3 Bücher.", "en": "Tom has 4 pens."}


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAYALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def looked_up_anew():
    runs._why_not.cache_clear()


def recipe_values(name):
    """A recipe as a mapping: two stages, or LangBridge's one."""
    english = name in ("math_english", "langbridge_english")
    pairs = [{"source": text, "target": "so it is 5.", "lang": lang} for lang, text in LANGUAGES.items()]
    stage = {"data": {"records": pairs}, "steps": 1, "batch_size": 2, "learning_rate": 0.01}
    task = dict(stage) if english else {**stage, "prompt": "{source} Answer:"}
    if english:
        task["data"] = {"records": [pair for pair in pairs if pair["lang"] == "en"]}
    stages = {"task": task} if name == "langbridge_english" else {"translation": stage, "task": task}
    values = {"encoder": ENCODER, "llm": LLM, "output": "unused", "device": "cpu", "progress": False, "stages": stages}
    if name == "langbridge_english":
        values["train_encoder"] = "embeddings"
    return {**values, "llm_input": {"task": not english}}


@pytest.fixture(scope="session")
def recipes(tmp_path_factory):
    """{name of a shipped recipe: a file}."""
    folder = tmp_path_factory.mktemp("recipes")
    files = {name: folder / f"{name}.yaml" for name in RECIPES}
    for name, file in files.items():
        file.write_text(yaml.safe_dump(recipe_values(name)), encoding="utf-8")
    return {name: str(file) for name, file in files.items()}


@pytest.fixture(scope="session")
def translator(tmp_path_factory):
    """Folder of a T5 with random weights."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = word_tokenizer(WORDS, end_after_text=True)
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    folder = tmp_path_factory.mktemp("translator")
    T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes, **special)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def bases(translator):
    """{a base that a row names: one that is here}; NLLB is an encoder in some rows and the translator in others."""
    encoders = dict.fromkeys(("ai-forever/mGPT", "facebook/xglm-1.7B"), ENCODER)
    return {**encoders, "facebook/nllb-200-3.3B": translator, "Mathoctopus/Parallel_xRFT_7B": LLM}


@pytest.fixture(scope="session")
def asking(tmp_path_factory):
    """A question in each language in place of mathematics' tasks, and a few of the others in their published files."""
    folder = Path(tmp_path_factory.mktemp("problems"))
    xcsqa_published(folder)
    xnli_published(folder)
    file = folder / "problems.jsonl"
    rows = [{"question": text, "answer": 5, "lang": lang} for lang, text in LANGUAGES.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = GenerationSettings(max_new_tokens=2, device="cpu")
    return Asking(data=str(folder), tasks=dict.fromkeys(("mgsm", "msvamp"), str(file)), limit=1, settings=settings)


@pytest.fixture
def sources(recipes, bases, tmp_path):
    return Sources(output=tmp_path / "tables", recipes=recipes, bases=bases)
