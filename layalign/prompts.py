"""Prompts: what the LLM reads beside the encoder, templates with {text} for the question and, where they name it, {language}."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from layalign.languages import language_code, language_name
from layalign.tasks.prompts import MATH, SAME_TEXT

# Prompts by name; any other is a template.
DEFAULT_PROMPT, TASK_PROMPT, CHAT, NO_PROMPT = "default", "task", "chat", "none"
# What chat templates that write today's date are given (the one that Llama 3.1's falls back to): data and answers do not change overnight.
DATE = datetime(2024, 7, 26)
_TODAY = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")
# What the published checkpoint of each task was trained with.
PUBLISHED = {"math": MATH, "xcsqa": SAME_TEXT, "xnli": SAME_TEXT}


def checked_prompt(template: Any, name: str = "prompt") -> str:
    """`template`, a str that contains {text} once.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(template, str) or template.count("{text}") != 1:
        raise ValueError(f"{name}: got {template!r}, takes a text that contains {{text}} once")
    return template


def fill_prompt(template: str, text: str, lang: str | None = None) -> str:
    """The prompt of one question: {text} and, by its English name, {language} filled in; other braces stay as they are.

    Raises:
        ValueError: the template names the language, and there is none or one without a known name.
    """
    before, _, after = template.partition("{text}")
    if "{language}" in template:
        if lang is None:
            raise ValueError(f"prompt: {template!r} names the language; pass lang, a code such as 'sw'")
        name = language_name(language_code(lang))
        before, after = before.replace("{language}", name), after.replace("{language}", name)
    return before + text + after


def fill_prompts(template: str, texts: Sequence[str], langs: Sequence[str] | None = None) -> list[str]:
    """The prompts of several questions, see `fill_prompt`. langs: the language of each, where they are known."""
    return [fill_prompt(template, text, langs[place] if langs else None) for place, text in enumerate(texts)]


def chat_prompt(tokenizer: Any) -> str:
    """The template of one user's message by the LLM's chat template, without the beginning of sequence that LayAlign puts first.

    Raises:
        ValueError: the tokenizer has no chat template, or one that changes what is said.
    """
    return checked_prompt(conversation(tokenizer).removeprefix(tokenizer.bos_token or ""))


def conversation(tokenizer: Any, turns: Iterable[tuple[str, str]] = ()) -> str:
    """What the LLM's chat template makes of a question {text} after turns (question, answer). Where it writes today's date, that is DATE.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"prompt: 'chat' needs a chat template, and the LLM's {type(tokenizer).__name__} has none")
    said: list[dict[str, str]] = []
    for question, answer in turns:
        said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    said.append({"role": "user", "content": "{text}"})
    dated = {}
    if "strftime_now" in str(tokenizer.chat_template):
        template = tokenizer.get_chat_template()
        dated["chat_template"] = _TODAY.sub(lambda today: repr(DATE.strftime(today["format"])), template)
    return tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, **dated)


def chosen_prompt(prompt: str | None, own: str | None, tokenizer: Any = None) -> str | None:
    """The template that a named prompt, or a template, stands for.

    Args:
        prompt: "default" for `own`, "chat" for the LLM's chat template, "none" or None for nothing, a name of PUBLISHED ("math", ...)
            for what the published checkpoint of it was trained with, or a template with {text}. An evaluation also takes "task",
            the published prompt of each task.
        own: the model's template.
        tokenizer: the LLM's, for its chat template.

    Raises:
        ValueError: none of these, or one that there is not.
    """
    if prompt is None or prompt == NO_PROMPT:
        return None
    if prompt == DEFAULT_PROMPT:
        return own
    if prompt == CHAT:
        return chat_prompt(tokenizer)
    if prompt in PUBLISHED:
        return PUBLISHED[prompt]
    if prompt == TASK_PROMPT:
        raise ValueError("prompt: 'task' is the prompt of a published task, and there is none here")
    if not isinstance(prompt, str) or prompt.count("{text}") != 1:
        names = ", ".join(map(repr, (DEFAULT_PROMPT, TASK_PROMPT, CHAT, NO_PROMPT, *PUBLISHED)))
        raise ValueError(f"prompt: got {prompt!r}, takes {names} or a text that contains {{text}} once")
    return prompt


def published_prompt(task: str | None, prompt: str | None) -> str | None:
    """The template that a converted checkpoint gets: that of a name of PUBLISHED, or `prompt`, with {text}, or "none".

    Raises:
        ValueError: neither, or both of them.
    """
    if task is not None and prompt is not None:
        raise ValueError(f"task, prompt: got {task!r} and {prompt!r}; give one of them")
    if task is not None:
        if task not in PUBLISHED:
            raise ValueError(f"task: got {task!r}, takes {', '.join(PUBLISHED)}")
        return PUBLISHED[task]
    return None if prompt in (None, NO_PROMPT) else checked_prompt(prompt)


def read_prompt(file: str | Path) -> str:
    """The template in a UTF-8 file, without the line end that editors put last.

    Raises:
        ValueError: no such file, or a template without {text}.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt_file: {file} cannot be read: {error}") from None
    return checked_prompt(text.removesuffix("\n").removesuffix("\r"), f"prompt_file: {file}")
