"""A LayAlign model as the harness asks it: what encoder and LLM read of a request, generation, log-likelihoods."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from layalign.generation.batches import longest_first
from layalign.harness.reading import Read, ReadingAnswerer
from layalign.loading import load_model
from layalign.processor import LayAlignProcessor
from layalign.prompts import CHAT, DEFAULT_PROMPT, TASK_PROMPT, chosen_prompt, fill_prompt, read_prompt

CONTEXT, DOC = "context", "doc"
QUESTION = "question"


@dataclass(kw_only=True)
class Options:
    """What --model_args takes beside `pretrained`; the harness's own --batch_size and --device come here too.

    Attributes:
        dtype: "float32", "bfloat16" or "float16"; "auto" as stored.
        device: cpu, cuda, cuda:1, ...; None for a GPU where there is one.
        batch_size: texts at a time.
        max_batch_size: not used.
        encoder_input: what the encoder reads: "context", the harness's whole text of a request, "doc" for the field `question` of its
            document, or "doc:FIELD" for another field.
        prompt: what the LLM reads: "context"; "task" for the template in the document's field `prompt`, which our own tasks have; or
            as `layalign.prompts.chosen_prompt` takes it: "default" for the processor's template, "none", "chat", a template with
            {text}. In templates {text} is what the encoder reads.
        prompt_file: a file with such a template.
        encoder_max_length: the encoder's text is cut to so many tokens.
        lang: the language of all texts, for encoders and prompts that are told it; None: the document's field `lang`, if any.

    Raises:
        ValueError: a value outside of these.
    """

    dtype: str = "auto"
    device: str | None = None
    batch_size: int | str = 1
    max_batch_size: int | None = None
    encoder_input: str = CONTEXT
    prompt: str | None = CONTEXT
    prompt_file: str | None = None
    encoder_max_length: int | None = None
    lang: str | None = None

    def __post_init__(self) -> None:
        if not str(self.batch_size).isdigit() or int(self.batch_size) < 1:
            raise ValueError(f"batch_size: got {self.batch_size!r}, takes a positive int")
        self.batch_size = int(self.batch_size)
        name, _, field = str(self.encoder_input).partition(":")
        if name not in (CONTEXT, DOC) or (name == CONTEXT and field):
            raise ValueError(f"encoder_input: got {self.encoder_input!r}, takes context, doc or doc:FIELD")
        if self.prompt_file is not None:
            if self.prompt != CONTEXT:
                raise ValueError(f"prompt_file: got {self.prompt_file!r} and prompt {self.prompt!r}, takes one of them")
            self.prompt = read_prompt(self.prompt_file)
        if self.prompt not in (CONTEXT, TASK_PROMPT, DEFAULT_PROMPT, CHAT):
            try:
                chosen_prompt(self.prompt, None)
            except ValueError as error:
                raise ValueError(f"{error}; or 'context'") from None

    @property
    def encoder_field(self) -> str | None:
        """The field of a document that the encoder reads; None: the context."""
        name, _, field = self.encoder_input.partition(":")
        return None if name == CONTEXT else field or QUESTION


class LayAlignHarnessModel(LM):
    """The harness's model "layalign".

    Args:
        pretrained: folder or hub name of a LayAlign model.
        options: see `Options`.

    Raises:
        ValueError: no such model, an option that there is not, or more than one process.
    """

    def __init__(self, pretrained: str, **options: Any):
        super().__init__()
        known = [field.name for field in fields(Options)]
        if unknown := sorted(options.keys() - set(known)):
            raise ValueError(f"model_args: got {', '.join(unknown)}, takes pretrained, {', '.join(known)}")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: the harness's model runs in one process; layalign evaluate splits questions"
            )
        self.options = Options(**options)
        device = self.options.device
        if device == "cuda:0":  # what the harness says where it was told nothing
            device = None
        self.model, self.processor = load_model(pretrained, self.options.dtype, device)
        self._device = self.model.device
        self._template = self._own_template(self.processor)

    def _own_template(self, processor: LayAlignProcessor) -> str | None:
        """The template that holds for all requests, None where there is none."""
        prompt = self.options.prompt
        if prompt in (CONTEXT, TASK_PROMPT):
            return None
        return chosen_prompt(prompt, processor.prompt_template, processor.tokenizer)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to the first of its request's `until`."""
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for arguments, places in self._groups(requests, with_arguments=True):
                told: dict[str, Any] = dict(normalize_gen_kwargs(arguments))
                until = [text for text in told.pop("until") if text]
                answerer = self._answerer(told.pop("max_gen_toks"), _for_transformers(told))
                for batch in self._batches(requests, places):
                    reads = [self._read(requests[place]) for place in batch]
                    for place, answer in zip(batch, answerer.written(reads, until), strict=True):
                        answers[place] = _cut(answer, until)
                        self.cache_hook.add_partial("generate_until", requests[place].args, answers[place])
                    bar.update(len(batch))
        return answers

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy search would write it) of each continuation."""
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        answerer = self._answerer(1, {})
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for _, places in self._groups(requests, with_arguments=False):
                for batch in self._batches(requests, places):
                    reads = [self._read(requests[place]) for place in batch]
                    said = [requests[place].args[1] for place in batch]
                    scores = answerer.scored(reads, said, together=self.options.prompt == CONTEXT)
                    for place, score in zip(batch, scores, strict=True):
                        found[place] = score
                        self.cache_hook.add_partial("loglikelihood", requests[place].args, score)
                    bar.update(len(batch))
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Not for LayAlign: a text alone leaves nothing for its encoder to read.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "loglikelihood_rolling: LayAlign reads a question and writes an answer, a text alone is neither; it takes tasks of "
            "generate_until, loglikelihood and multiple_choice"
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation by the LLM's chat template, without the beginning of sequence that LayAlign puts first."""
        tokenizer = self.processor.tokenizer
        text = tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text.removeprefix(tokenizer.bos_token or "")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The LLM's, for the harness's records.

        Raises:
            ValueError: it has none.
        """
        if not chat_template:
            return None
        if not getattr(self.processor.tokenizer, "chat_template", None):
            raise ValueError("apply_chat_template: the LLM's tokenizer has no chat template")
        return str(self.processor.tokenizer.chat_template)

    @property
    def tokenizer_name(self) -> str:
        """The LLM's tokenizer's, for the harness's caches."""
        return str(self.processor.tokenizer.name_or_path).replace("/", "__")

    def _answerer(self, max_new_tokens: int, arguments: dict[str, Any]) -> ReadingAnswerer:
        options = self.options
        return ReadingAnswerer(
            self.model,
            self.processor,
            max_new_tokens=max_new_tokens,
            batch_size=int(options.batch_size),
            encoder_max_length=options.encoder_max_length,
            **arguments,
        )

    def _read(self, request: Any) -> Read:
        """What a request's encoder and LLM read."""
        context, doc, options = request.args[0], request.doc or {}, self.options
        text = context if options.encoder_field is None else _field(request, options.encoder_field, "encoder_input")
        lang = options.lang or doc.get("lang")
        template = _field(request, "prompt", "prompt=task") if options.prompt == TASK_PROMPT else self._template
        if options.prompt == CONTEXT:
            prompt = context
        else:
            prompt = fill_prompt(template, text, lang) if template else None
        return Read(text, prompt, lang)

    def _groups(self, requests: Sequence[Any], with_arguments: bool) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Places of the requests that can share a batch, with their arguments of generation."""
        groups: dict[tuple[str, bool, bool], list[int]] = {}
        for place, request in enumerate(requests):
            read = self._read(request)
            arguments = json.dumps(request.args[1], sort_keys=True, default=repr) if with_arguments else ""
            groups.setdefault((arguments, read.lang is None, read.prompt is None), []).append(place)
        for places in groups.values():
            yield requests[places[0]].args[1] if with_arguments else {}, places

    def _batches(self, requests: Sequence[Any], places: list[int]) -> Iterator[list[int]]:
        lengths = [sum(len(str(argument)) for argument in requests[place].args) for place in places]
        return ([places[index] for index in batch] for batch in longest_first(lengths, int(self.options.batch_size)))


def _field(request: Any, name: str, option: str) -> str:
    value = (request.doc or {}).get(name)
    if not isinstance(value, str):
        has = ", ".join(map(str, request.doc or {})) or "nothing"
        raise ValueError(f"{option}: the documents of {request.task_name} have no text {name!r}; they have {has}")
    return value


def _for_transformers(arguments: dict[str, Any]) -> dict[str, Any]:
    """The harness's arguments of generation as transformers takes them: greedy search has no temperature."""
    if arguments.get("do_sample"):
        return arguments
    return {
        name: value for name, value in arguments.items() if name not in ("do_sample", "temperature", "top_p", "top_k")
    }


def _cut(text: str, until: Sequence[str]) -> str:
    for end in until:
        text = text.partition(end)[0]
    return text
