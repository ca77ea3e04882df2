"""The real models, where a cache already holds them converted; nothing is downloaded here."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from layalign.kernels.files import cache_folder
from layalign.tasks import load_task

CACHE = cache_folder()
DATA = Path(__file__).parents[3] / ".." / "shared" / "data"

needs_mgsm = pytest.mark.skipif(not (DATA / "mgsm").is_dir(), reason="the MGSM files are not at ../shared/data/mgsm")


@pytest.mark.usefixtures("real_models")
@needs_mgsm
def test_encoder_finds_the_same_question_in_other_languages():
    folder = CACHE / "multilingual-e5-small"
    encoder, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    pooled = {}
    for language in ("en", "sw", "te"):
        # The "query: " in front is what multilingual-e5 was trained with.
        texts = [f"query: {problem['question']}" for problem in load_task("mgsm", DATA, [language], limit=40)]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            states = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled[language] = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    english = pooled.pop("en")
    for states in pooled.values():
        nearest = (states @ english.T).argmax(1)
        assert (nearest == torch.arange(len(nearest))).float().mean() >= 0.9


@pytest.mark.usefixtures("real_models")
@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is the capital of France?", "Paris"),
        ("Tom has 3 apples. He buys 4 more. How many apples does he have now?", "7"),
    ],
    ids=["capital", "sum"],
)
def test_llm_answers_in_english(question, expected):
    folder = CACHE / "SmolLM2-135M-Instruct"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert expected in tokenizer.decode(answer)


@pytest.mark.usefixtures("real_models")
def test_tokenizers_as_published():
    encoder = AutoTokenizer.from_pretrained(CACHE / "multilingual-e5-small")
    ids = encoder("Hello world").input_ids
    assert ids == [0, 35378, 8999, 2]
    llm = AutoTokenizer.from_pretrained(CACHE / "SmolLM2-135M-Instruct")
    assert llm.decode(llm("1,234 ক ก\n").input_ids) == "1,234 ক ก\n"
    assert len(llm("1234").input_ids) == 4
