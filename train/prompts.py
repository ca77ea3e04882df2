"""Templates of recipes, `{field}` and `{field[key]}` and nothing else of what format strings can do, and prompts made of them."""

from __future__ import annotations

import logging
import string
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from layalign.languages import language_name
from layalign.prompts import CHAT, chat_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from layalign.train.recipe import Recipe
    from layalign.train.stage_recipe import StageRecipe

logger = logging.getLogger(__name__)


def check_template(template: str, name: str) -> list[str]:
    """Field names of a template, without the indices behind them.

    Args:
        template: the format string.
        name: the setting it belongs to, for messages.

    Raises:
        ValueError: broken braces, fields without a name, attributes or format codes.
    """
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"{name}: broken template {template!r}: {error}") from None
    names = []
    for _, expression, code, conversion in parts:
        if not expression or code or conversion or "." in expression or expression[0].isdigit():
            raise ValueError(f"{name}: template fields are written {{field}} or {{field[key]}}, got {template!r}")
        names.append(expression.partition("[")[0])
    return names


def fill_prompt(template: str, record: Mapping[str, str]) -> str:
    """The prompt of one record: {source} and, by its English name, {language} filled in.

    Raises:
        ValueError: the template names the language, and the record's has no known name.
    """
    return filler(template)(record)


def filler(template: str) -> Callable[[Mapping[str, str]], str]:
    """`fill_prompt` of one template, for many records."""
    if "language" in check_template(template, "prompt"):
        return lambda record: template.format(source=record["source"], language=language_name(record["lang"]))
    return lambda record: template.format(source=record["source"])


def stage_template(stage: StageRecipe, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template of a stage's prompt, with {source} and {language}: "chat" is one user's message by the LLM's chat template.

    Raises:
        ValueError: "chat", and the LLM's tokenizer has no chat template.
    """
    if stage.prompt != CHAT:
        return stage.prompt
    try:
        template = chat_prompt(tokenizer)
    except ValueError as error:
        raise ValueError(f"stages: {error}") from None
    return "{source}".join(part.replace("{", "{{").replace("}", "}}") for part in template.split("{text}"))


def prompt_template(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The processor's template, {text} for the question and {language} for its language, as the task stage's prompt has it; None if
    the LLM reads no text there.
    """
    if "task" not in recipe.stages or not recipe.llm_input["task"]:
        return None
    prompt = stage_template(recipe.stages["task"], tokenizer)
    assert prompt is not None, "Recipe requires one where the LLM reads text"
    if check_template(prompt, "prompt").count("source") != 1:
        logger.warning(
            "the task prompt does not hold {source} once: the saved processor has no prompt template, pass prompts to it"
        )
        return None
    return prompt.format(source="{text}", language="{language}")


def unread_prompts(recipe: Recipe) -> list[str]:
    """A line for each stage whose prompt the LLM does not read."""
    return [
        f"stages.{name}.prompt is not read: the LLM reads no text in this stage (llm_input.{name} is false)"
        for name, stage in recipe.stages.items()
        if stage.prompt is not None and not recipe.llm_input[name]
    ]
