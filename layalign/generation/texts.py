"""Callables that answer lists of texts with a model: sorted by length, batched, returned in order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from layalign.generation.batches import Asked, asked_together, languages_of, listed, longest_first
from layalign.generation.logits import label_loglikelihoods, watched
from layalign.generation.mixin import chosen_setting
from layalign.prompts import DEFAULT_PROMPT, checked_prompt, chosen_prompt, fill_prompt, fill_prompts
from layalign.sequence import kept_columns, last_column
from layalign.source_languages import check_languages
from layalign.spelling import check_count, no_text

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    from layalign import LayAlignForConditionalGeneration, LayAlignProcessor

logger = logging.get_logger(__name__)

BATCH_SIZE = 8
MAX_NEW_TOKENS = 256
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


class BatchedAnswerer(ABC):
    """Sorting, batching and decoding; what is generated for one batch is the subclass's."""

    # Of the next call's texts, a seed each, for engines that sample each text by itself; None: drawn.
    seeds: Sequence[int] | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int | None,
        batch_size: int,
        generate_kwargs: dict[str, Any],
    ):
        # What the caller's configuration says counts; an argument of the same name would win over it in transformers.
        config = generate_kwargs.get("generation_config")
        if max_new_tokens is None:
            max_new_tokens = chosen_setting("max_new_tokens", generate_kwargs) or MAX_NEW_TOKENS
        check_count("max_new_tokens", max_new_tokens)
        if generate_kwargs.get("max_length") is not None:
            raise ValueError(
                f"max_length: got {generate_kwargs['max_length']}; max_new_tokens says how much is written"
            )
        check_count("batch_size", batch_size)
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.new_tokens = 0
        self._cut: list[bool] = []
        ends = getattr(config, "eos_token_id", None) or model.generation_config.eos_token_id
        self._ends = _end_tokens(generate_kwargs.get("eos_token_id", ends), tokenizer)
        self._pad = next(iter(self._ends), 0) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        greedy = {} if generate_kwargs.get("do_sample", getattr(config, "do_sample", None)) else GREEDY
        # An LLM's own max_length would be warned about at each batch.
        own = {"max_new_tokens": max_new_tokens, "max_length": None, "pad_token_id": self._pad}
        self._arguments = {**greedy, **own, **generate_kwargs}
        if self._ends:
            self._arguments["eos_token_id"] = self._ends

    def __call__(
        self, texts: Iterable[str], streamer: BaseStreamer | None = None, langs: Sequence[str] | None = None
    ) -> list[str]:
        """The answers to `texts`, in their order.

        Args:
            texts: one str each.
            streamer: a transformers streamer, for one text.
            langs: the language of each text, for encoders and prompts that are told it.

        Raises:
            ValueError: a text that cannot be answered, or several sequences a text.
        """
        returned = chosen_setting("num_return_sequences", self._arguments, self.model.generation_config)
        if returned not in (None, 1):
            raise ValueError(
                f"num_return_sequences: got {returned}, takes 1 where there is one answer a text; `sequences` gives all"
            )
        return [answers[0] for answers in self.sequences(texts, streamer, langs)]

    def sequences(
        self, texts: Iterable[str], streamer: BaseStreamer | None = None, langs: Sequence[str] | None = None
    ) -> list[list[str]]:
        """The same with every returned sequence: a list of `num_return_sequences` answers for each text."""
        texts = listed(texts)
        self.check(texts)
        languages = languages_of(langs, len(texts))
        extra = {} if streamer is None else {"streamer": streamer}
        answers: list[list[str]] = [[] for _ in texts]
        self._cut = [False] * len(texts)
        for places in longest_first([len(text) for text in texts], self.batch_size):
            chosen = asked_together(texts, languages, places)
            with torch.inference_mode():
                found = self._generate(chosen, **self._arguments, **extra)
                rows = getattr(found, "sequences", found).cpu()  # of return_dict_in_generate too
            for place, group in zip(places, rows.view(len(places), -1, rows.shape[1]), strict=True):
                answers[place] = [self._decode(row) for row in group]
                self._cut[place] = any(self._is_cut(row) for row in group)
        return answers

    def check(
        self,
        texts: Sequence[str],
        name: Callable[[int], str] = "texts[{}]".format,
        langs: Sequence[str] | None = None,
    ) -> None:
        """Look at texts before any is answered.

        Args:
            texts: one str each.
            name: what a text's place in `texts` is called in a message.
            langs: the language of each, where they are told.

        Raises:
            ValueError: a text that cannot be answered, or a language that the encoder or the prompt has no name for.
        """
        for place, text in enumerate(texts):
            if reason := self.unanswerable(text):
                raise ValueError(f"{name(place)}: {reason}")
        self.check_languages(langs)

    @abstractmethod
    def check_languages(self, langs: Sequence[str] | None) -> None:
        """Raises ValueError for a language that is not known where it has to be; None: they are not told."""

    def unanswerable(self, text: str) -> str | None:
        """Why one text cannot be answered; None if it can."""
        if not isinstance(text, str) or not text.strip():
            return f"got {text!r}, takes a text that is not empty"
        return no_text(text)

    def loglikelihoods(
        self, texts: Sequence[str], choices: Sequence[Sequence[str]], langs: Sequence[str] | None = None
    ) -> list[list[float]]:
        """How likely the model holds each of some given answers, as it would answer a text.

        Args:
            texts: one str each.
            choices: for each text the answers to compare, at least one. An answer's tokens are those that training makes of a
                target, without the end of sequence.
            langs: the language of each text, as for a call.

        Returns:
            For each text a number a choice: the sum over its tokens of the log of their probability, in nats.

        Raises:
            ValueError: a text that cannot be answered, or one without choices or with an empty one.
        """
        texts = listed(texts)
        self.check(texts)
        languages = languages_of(langs, len(texts))
        if len(choices) != len(texts):
            raise ValueError(f"choices: got {len(choices)} lists for {len(texts)} texts")
        for place, given in enumerate(choices):
            if isinstance(given, str) or not given or not all(isinstance(said, str) and said for said in given):
                raise ValueError(
                    f"choices[{place}]: got {given!r}, takes a list of at least one text, none of them empty"
                )
        asked = [(place, said) for place, given in enumerate(choices) for said in given]
        found: list[float] = [0.0] * len(asked)
        for rows in longest_first([len(texts[place]) + len(said) for place, said in asked], self.batch_size):
            places, said = zip(*[asked[row] for row in rows], strict=True)
            chosen = asked_together(texts, languages, places)
            with torch.inference_mode():
                sums = self._loglikelihoods(chosen, list(said))
            for row, value in zip(rows, sums.tolist(), strict=True):
                found[row] = value
        numbers = iter(found)
        return [[next(numbers) for _ in given] for given in choices]

    def details(self, texts: Sequence[str], langs: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """What else a record says of the answer to each text: JSON values by name, here {"cut": True} where it has no end.

        Args:
            texts: those of the last call.
            langs: the language of each text, as for a call.
        """
        known = self._cut if len(self._cut) == len(texts) else [False] * len(texts)
        return [{"cut": True} if cut else {} for cut in known]

    @abstractmethod
    def _generate(self, asked: Asked, **arguments: Any) -> torch.Tensor:
        """Rows (len(texts) * sequences a text, new) of token ids."""

    @abstractmethod
    def _loglikelihoods(self, asked: Asked, answers: list[str]) -> torch.Tensor:
        """(len(texts),) the log-likelihood of one answer to each text, in nats."""

    def _decode(self, row: torch.Tensor) -> str:
        """The answer in one row (new,) of token ids, without white space around it."""
        return self._written(row).strip()

    def _is_cut(self, row: torch.Tensor) -> bool:
        """Whether one row (new,) ends because it was long enough: rows that end before the others are padded."""
        whole = len(row) >= self._arguments["max_new_tokens"] and int(row[-1]) != self._pad
        return whole and self._end(row) is None

    def _end(self, row: torch.Tensor) -> int | None:
        """Where the end of sequence stands in one row (new,) of token ids; None: nowhere."""
        ends = torch.isin(row, torch.tensor(self._ends, dtype=row.dtype)).nonzero()
        return int(ends[0]) if len(ends) else None

    def _written(self, row: torch.Tensor) -> str:
        """The text of one row (new,) of token ids, up to its end of sequence; what follows that is padding."""
        written = row[: self._end(row)]
        self.new_tokens += min(len(written) + 1, len(row))
        return self.tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Answerer(BatchedAnswerer):
    """A callable list[str] -> list[str] over a LayAlign model: greedy unless `generate_kwargs` say otherwise.

    Args:
        model: a LayAlignForConditionalGeneration.
        processor: its LayAlignProcessor.
        max_new_tokens: the most tokens of an answer; None: as a `generation_config` that is given says, else 256.
        batch_size: texts at a time; it changes the speed, and answers only as bfloat16 and float16 round.
        prompt: what the LLM reads beside the encoder, by name or as a template, see `layalign.prompts.chosen_prompt`; the
            processor's by default.
        encoder_max_length: questions are cut to so many of the encoder's tokens; None: a question of more than the encoder
            reads (BERT's kind: 512) is refused before any is answered.
        generate_kwargs: anything transformers' generate takes.

    Attributes:
        new_tokens: the tokens written so far.

    Raises:
        ValueError: a setting outside of these.
    """

    def __init__(
        self,
        model: LayAlignForConditionalGeneration,
        processor: LayAlignProcessor,
        *,
        max_new_tokens: int | None = None,
        batch_size: int = BATCH_SIZE,
        prompt: str | None = DEFAULT_PROMPT,
        encoder_max_length: int | None = None,
        **generate_kwargs: Any,
    ):
        super().__init__(model, processor.tokenizer, max_new_tokens, batch_size, generate_kwargs)
        limit = model.encoder_limit
        if encoder_max_length is not None:
            check_count("encoder_max_length", encoder_max_length)
            if limit is not None and encoder_max_length > limit:
                raise ValueError(f"encoder_max_length: got {encoder_max_length}, the encoder takes {limit}")
        self.encoder_max_length = encoder_max_length
        self.processor = processor
        self.prompt = chosen_prompt(prompt, processor.prompt_template, processor.tokenizer)
        if self.prompt is None and processor.prompt_template is not None:
            logger.warning_once(
                "the LLM reads no prompt, and this model's task stage had one: prompt='default' is what it was trained with"
            )

    def check_languages(self, langs: Sequence[str] | None) -> None:
        """Raises ValueError for a language that the encoder or the prompt has no name for."""
        spoken = dict.fromkeys(langs or ())
        check_languages(self.processor.encoder_tokenizer, spoken)
        if self.prompt is not None:
            for lang in spoken:
                fill_prompt(self.prompt, "", lang)

    def unanswerable(self, text: str) -> str | None:
        """As for any text; too long a one, by its number of tokens, unless questions are cut."""
        limit = self.model.encoder_limit
        reason = super().unanswerable(text)
        if reason or limit is None or self.encoder_max_length is not None:
            return reason
        # A text of few bytes is not tokenised for this: it has no more tokens than that, or the model refuses it.
        if len(self._encoded(text).encode()) > limit // 2 and (count := self.encoder_tokens(text)) > limit:
            return f"got {count} tokens, the encoder takes {limit}; encoder_max_length={limit} cuts it"
        return None

    def encoder_tokens(self, text: str) -> int:
        """How many tokens the encoder would read."""
        return len(self.processor.encoder_tokenizer(self._encoded(text), verbose=False)["input_ids"])

    def _encoded(self, text: str) -> str:
        """What of a text the encoder reads."""
        return (self.processor.encoder_template or "{text}").replace("{text}", text)

    def _generate(self, asked: Asked, **arguments: Any) -> torch.Tensor:
        return watched(self.model, **self._batch(asked), **arguments)

    def _loglikelihoods(self, asked: Asked, answers: list[str]) -> torch.Tensor:
        batch = self._batch(asked, target=answers)
        labels = batch["labels"]
        if self.tokenizer.eos_token_id is not None:  # the processor ends a target with it, in the last column
            labels[:, -1] = -100
        out = self.model(**batch, only_scored=True)
        return label_loglikelihoods(out.logits, out.labels)

    def _batch(self, asked: Asked, **target: Any) -> BatchFeature:
        texts, langs = asked.texts, asked.langs
        prompts = None if self.prompt is None else fill_prompts(self.prompt, texts, langs)
        batch = self.processor(texts, prompts, lang=langs, encoder_max_length=self.encoder_max_length, **target)
        return batch.to(self.model.device)


class LLMAnswerer(BatchedAnswerer):
    """The same over an LLM alone.

    Args:
        llm: a transformers causal LM.
        tokenizer: its tokenizer, with or without a padding token.
        prompt_template: what it reads, a str with {text}.
        max_new_tokens, batch_size, generate_kwargs: as for `Answerer`.
        add_bos: put the beginning of sequence first where the tokenizer does not do so.

    Raises:
        ValueError: a setting outside of these.
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt_template: str = "{text}",
        *,
        max_new_tokens: int | None = None,
        batch_size: int = BATCH_SIZE,
        add_bos: bool = False,
        **generate_kwargs: Any,
    ):
        super().__init__(llm, tokenizer, max_new_tokens, batch_size, generate_kwargs)
        self._own_specials = True  # whether the tokenizer adds what it adds; a chat template says all itself
        if add_bos and tokenizer.bos_token_id is None:
            raise ValueError("add_bos: the tokenizer has no beginning-of-sequence token")
        self.prompt_template = checked_prompt(prompt_template, "prompt_template")
        self.add_bos = add_bos

    def check_languages(self, langs: Sequence[str] | None) -> None:
        """Raises ValueError for a language that the prompt has no name for."""
        for lang in dict.fromkeys(langs or ()):
            fill_prompt(self.prompt_template, "", lang)

    def _generate(self, asked: Asked, **arguments: Any) -> torch.Tensor:
        ids, mask = self._padded(self._prompts(asked))
        arguments = last_column(self.model) | arguments
        return watched(self.model, input_ids=ids, attention_mask=mask, **arguments)[:, ids.shape[1] :]

    def _loglikelihoods(self, asked: Asked, answers: list[str]) -> torch.Tensor:
        pairs = self._pairs(asked, answers)
        ids, mask = self._padded([prompt + target for prompt, target in pairs])
        width = max(len(target) for _, target in pairs)
        wanted = torch.tensor([[-100] * (width - len(row)) + row for _, row in pairs], device=ids.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        kept = kept_columns(width + 1, ids)
        out = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=kept
        )
        return label_loglikelihoods(out.logits[:, :-1], wanted)

    def _padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask (B, N), padded on the left."""
        width = max(map(len, rows))
        ids = torch.tensor([[self._pad] * (width - len(row)) + row for row in rows], device=self.model.device)
        lengths = torch.tensor([[len(row)] for row in rows], device=self.model.device)
        return ids, (torch.arange(width, device=self.model.device) >= width - lengths).long()

    def _pairs(self, asked: Asked, answers: list[str]) -> list[tuple[list[int], list[int]]]:
        """(ids of the prompt, ids of the answer) of each text."""
        targets = [self.tokenizer(said, add_special_tokens=False)["input_ids"] for said in answers]
        return list(zip(self._prompts(asked), targets, strict=True))

    def _prompts(self, asked: Asked) -> list[list[int]]:
        return [self._prompt(prompt) for prompt in fill_prompts(self.prompt_template, asked.texts, asked.langs)]

    def _prompt(self, prompt: str) -> list[int]:
        """Token ids without the end of sequence that some tokenizers add."""
        ids = self.tokenizer(prompt, add_special_tokens=self._own_specials)["input_ids"]
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        bos = self.tokenizer.bos_token_id
        if (self.add_bos and ids[:1] != [bos]) or not ids:
            ids = [self._pad if bos is None else bos, *ids]
        return ids


def _end_tokens(own: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end an answer: `own` (int, list or None) and the tokenizer's, put after every training target."""
    tokens = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(token for token in tokens if token is not None))
