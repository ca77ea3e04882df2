"""What the LLM reads beside the encoder: templates, names of prompts, files, chat templates."""

import pytest

from layalign.generation.jobs import generate_texts
from layalign.generation.texts import Answerer
from layalign.prompts import PUBLISHED, chat_prompt, chosen_prompt, fill_prompt, read_prompt
from layalign.tasks.prompts import MATH
from tests.tiny_models import word_tokenizer

CHAT = "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


def test_other_braces_stay():
    assert fill_prompt("{a} {text} {{b}}", "{text} {language}") == "{a} {text} {language} {{b}}"
    assert fill_prompt("from {language}: {text}", "{language}", "sw") == "from Swahili: {language}"
    assert fill_prompt("{text} in {language}", "x", "Flemish") == "x in Dutch"


def test_a_language_that_is_not_there():
    with pytest.raises(ValueError, match="names the language; pass lang"):
        fill_prompt("from {language}: {text}", "x")
    with pytest.raises(ValueError, match="no English name known for language 'xx'"):
        fill_prompt("from {language}: {text}", "x", "xx")


def test_prompts_by_name(loaded):
    _, processor = loaded
    own, tokenizer = processor.prompt_template, processor.tokenizer
    assert chosen_prompt("default", own) == own == "question {text} answer"
    assert chosen_prompt("none", own) is chosen_prompt(None, own) is None
    assert chosen_prompt("math", own) == MATH == PUBLISHED["math"]
    assert chosen_prompt("what {text}", own) == "what {text}"
    for prompt, message in (
        ("task", "'task' is the prompt of a published task"),
        ("chat", "needs a chat template"),
        ("maths", "takes 'default', 'task', 'chat', 'none', 'math'"),
        ("{text} {text}", "contains {text} once"),
        (7, "prompt: got 7"),
    ):
        with pytest.raises(ValueError, match=message.replace("{", r"\{")):
            chosen_prompt(prompt, own, tokenizer)


def test_a_chat_template_that_writes_the_date_writes_one_date():
    """A run that goes on tomorrow reads the same data, and a job the same prompt."""
    tokenizer = word_tokenizer(["so"], end_after_text=False)
    date = '{% set date = strftime_now("%d %b %Y") if strftime_now is defined else "" %}{{ date }} '
    tokenizer.chat_template = date + "{{ strftime_now( '%Y' ) }} " + CHAT
    assert chat_prompt(tokenizer).startswith("26 Jul 2024 2024 ")


def test_the_chat_template_is_that_of_one_message():
    tokenizer = word_tokenizer(["a"], end_after_text=False)
    tokenizer.chat_template = "<s>" + CHAT
    assert chat_prompt(tokenizer) == "<|user|> {text} <|end|><|assistant|>"
    tokenizer.chat_template = "{{ messages[0].content | replace('{', '(') }}"
    with pytest.raises(ValueError, match=r"contains \{text\} once"):
        chat_prompt(tokenizer)


def test_prompt_files(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes("\ufeffline one\n{text}\n\n".encode())
    assert read_prompt(file) == "line one\n{text}\n"
    file.write_text("no place")
    with pytest.raises(
        ValueError, match=r"prompt_file: .*prompt.txt: got 'no place', takes a text that contains \{text\} once"
    ):
        read_prompt(file)
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompt(tmp_path / "absent")


def test_names_reach_the_model(loaded, model_folder, questions):
    by_name = generate_texts(
        model_folder, questions[:3], prompt="math", max_new_tokens=5, device="cpu", write=lambda _: None
    )
    assert [record["answer"] for record in by_name] == Answerer(*loaded, prompt=MATH, max_new_tokens=5)(questions[:3])


def test_a_model_with_a_prompt_says_once_that_it_is_asked_without(loaded, monkeypatch):
    from layalign.generation import texts

    said = []
    monkeypatch.setattr(texts.logger, "warning_once", said.append)
    Answerer(*loaded)
    Answerer(*loaded, prompt="so {text}")
    assert said == []
    Answerer(*loaded, prompt=None)
    assert len(said) == 1
    assert "task stage had one" in said[0]
