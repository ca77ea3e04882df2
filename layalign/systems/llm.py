"""An LLM alone, with a prompt, a chat template or worked examples, as a system."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteriaList

from layalign.generation.batches import Asked
from layalign.generation.stopping import EndsWith
from layalign.generation.texts import LLMAnswerer
from layalign.loading import load_llm, load_tokenizer, torch_device, torch_dtype
from layalign.prompts import CHAT, DEFAULT_PROMPT, checked_prompt, chosen_prompt, conversation, fill_prompt
from layalign.spreading import spread_llm
from layalign.systems.examples import Example, chosen_examples, read_examples
from layalign.systems.folders import causal_config, fingerprint
from layalign.systems.system import System

BETWEEN = "\n\n"
PLAIN, WITH_EXAMPLES = "{text}", "Question: {text}\nAnswer:"


@dataclass(frozen=True, kw_only=True)
class LLM(System):
    """Any causal LM of transformers.

    Attributes:
        llm: its folder, hub name or `layalign:NAME`.
        examples: a file of worked examples, see `read_examples`; None for none.
        shots: how many of them a question comes after, those in its language where they say theirs.
    """

    llm: str
    examples: str | None = None
    shots: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.shots, bool) or not isinstance(self.shots, int) or self.shots < 0:
            raise ValueError(f"shots: got {self.shots!r}, takes an int from 0")
        if (self.examples is None) != (self.shots == 0):
            raise ValueError(f"shots: got {self.shots} and examples {self.examples!r}, takes both or none")

    @property
    def name(self) -> str:
        """The folder's, and the number of examples."""
        shown = Path(self.llm).name
        return f"{shown} ({self.shots}-shot)" if self.shots else shown

    def check(self, langs: Iterable[str] = ()) -> None:
        """See `System`."""
        causal_config("llm", self.llm)
        chosen_examples(
            self._examples, self.shots, [*langs] or [None for first in self._examples[:1] if not first.lang]
        )

    def fingerprint(self) -> dict[str, Any]:
        """See `System`."""
        found: dict[str, Any] = {"llm": fingerprint(self.llm)}
        if self.shots:
            found |= {"examples": fingerprint(self.examples or ""), "shots": self.shots}
        return found

    def load(self, prompt: str | None = DEFAULT_PROMPT) -> PromptedLLM:
        """See `System`; the system's own prompt is the question, with examples between "Question: " and "Answer:"."""
        return PromptedLLM(*self._loaded, **self.answering(prompt))

    def answering(self, prompt: str | None) -> dict[str, Any]:
        """The other arguments of its answerer."""
        own = WITH_EXAMPLES if self.shots else PLAIN
        return {
            "prompt_template": CHAT if prompt == CHAT else chosen_prompt(prompt, own),
            "examples": self._examples,
            "shots": self.shots,
            "max_new_tokens": self.settings.max_new_tokens,
            "batch_size": self.settings.batch_size,
            **self.generate,
        }

    @cached_property
    def _examples(self) -> list[Example]:
        return [] if self.examples is None else read_examples(self.examples)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        device, dtype = torch_device(self.settings.device), torch_dtype(self.settings.dtype)
        causal_config("llm", self.llm)
        tokenizer = load_tokenizer("llm", self.llm)
        llm = load_llm(self.llm, dtype).eval()
        if self.settings.devices is None:
            return llm.to(device), tokenizer
        spread_llm(llm, self.settings.devices)
        return llm, tokenizer


class PromptedLLM(LLMAnswerer):
    """`LLMAnswerer` with chat templates and worked examples.

    With a template, examples are filled into it as the question is, each followed by its answer, an empty line between them, and
    an answer ends where the LLM goes on to a next question of its own. With a chat template they are earlier turns. The choices of
    `loglikelihoods` are read as one text with the prompt, after a space where the prompt ends without one.

    Args:
        llm, tokenizer: the LLM and its tokenizer.
        prompt_template: a template with {text} and perhaps {language}, or "chat".
        examples: worked examples, all with a language or none.
        shots: how many of them are read.
        generate_kwargs: the other arguments of `LLMAnswerer`.

    Raises:
        ValueError: a setting outside of these, or "chat" where the tokenizer has no chat template.
    """

    def __init__(
        self,
        llm: Any,
        tokenizer: Any,
        prompt_template: str | None = PLAIN,
        *,
        examples: Sequence[Example] = (),
        shots: int = 0,
        **generate_kwargs: Any,
    ):
        if prompt_template is None:
            raise ValueError("prompt: got none, but an LLM alone reads nothing else than its prompt")
        self._chat = prompt_template == CHAT
        self.examples, self.shots = list(examples), shots
        self._before: dict[str | None, str] = {}
        if self._chat:
            rendered = conversation(tokenizer)
            generate_kwargs.setdefault(
                "add_bos", bool(tokenizer.bos_token) and rendered.startswith(tokenizer.bos_token)
            )
            prompt_template = rendered.removeprefix(tokenizer.bos_token or "")
        super().__init__(llm, tokenizer, prompt_template, **generate_kwargs)
        self._own_specials = not self._chat
        self._next = None
        if shots and not self._chat:
            head = self.prompt_template.partition("{text}")[0]
            if head.strip() or not any(BETWEEN in example.answer for example in self.examples):
                self._next = BETWEEN + head.rstrip()

    def prompt(self, text: str, lang: str | None = None) -> str:
        """What the LLM reads for one question, its beginning-of-sequence token apart."""
        if not self.shots:
            return fill_prompt(self.prompt_template, text, lang)
        if lang not in self._before:
            self._before[lang] = self._rendered(lang)
        before = self._before[lang]
        if not self._chat:
            return before + fill_prompt(self.prompt_template, text, lang)
        head, _, tail = before.partition("{text}")
        return head + text + tail

    def _rendered(self, lang: str | None) -> str:
        chosen = chosen_examples(self.examples, self.shots, [lang])[lang]
        if self._chat:
            template = checked_prompt(
                conversation(self.tokenizer, [(turn.question, turn.answer) for turn in chosen]), "chat template"
            )
            return template.removeprefix(self.tokenizer.bos_token or "")
        filled = [fill_prompt(self.prompt_template, example.question, lang) for example in chosen]
        return "".join(
            f"{question}{_space_after(question)}{example.answer}{BETWEEN}"
            for question, example in zip(filled, chosen, strict=True)
        )

    def _generate(self, asked: Asked, **arguments: Any) -> torch.Tensor:
        if self._next is not None:
            ends = EndsWith(self.tokenizer, [self._next])
            arguments["stopping_criteria"] = StoppingCriteriaList([*arguments.get("stopping_criteria", ()), ends])
        return super()._generate(asked, **arguments)

    def _prompts(self, asked: Asked) -> list[list[int]]:
        return [self._prompt(prompt) for prompt in self._filled(asked)]

    def _filled(self, asked: Asked) -> list[str]:
        langs: Sequence[str | None] = asked.langs or [None] * len(asked.texts)
        return [self.prompt(text, lang) for text, lang in zip(asked.texts, langs, strict=True)]

    def _pairs(self, asked: Asked, answers: list[str]) -> list[tuple[list[int], list[int]]]:
        pairs = []
        for prompt, said in zip(self._filled(asked), answers, strict=True):
            whole = self._prompt(prompt + _space_after(prompt) + said)
            # A tokenizer joins spaces to the word after them: they are the answer's, or all of its first token were the prompt's.
            alone = prompt[: max(len(prompt.rstrip()), prompt.rfind("\n") + 1)]
            length = min(len(self._prompt(alone)), len(whole) - 1)
            pairs.append((whole[:length], whole[length:]))
        return pairs

    def _decode(self, row: Any) -> str:
        answer = super()._decode(row)
        return answer if self._next is None else answer.partition(self._next)[0].rstrip()


def _space_after(prompt: str) -> str:
    return "" if not prompt or prompt[-1].isspace() else " "
