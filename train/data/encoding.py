"""Tokenising records, many at a time: prompt and target each cut to its own length."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tokenizers
import transformers
from tqdm.auto import tqdm

from layalign.source_languages import source_code, takes_source_language
from layalign.train.data.collate import EncodedRecords, Rows
from layalign.train.prompts import fill_prompt, filler, stage_template

if TYPE_CHECKING:
    from layalign.processor import LayAlignProcessor
    from layalign.train.data.sources import Line
    from layalign.train.stage_recipe import StageRecipe

logger = logging.getLogger(__name__)

_CHUNK = 1024
_BAR_FROM = 5000


class Chunk(NamedTuple):
    """Some encoded records: all their ids one after the other (int32), how many each has (n,) int64, and their languages."""

    questions: np.ndarray
    question_lengths: np.ndarray
    texts: np.ndarray
    text_lengths: np.ndarray
    prompt_lengths: np.ndarray
    languages: list[str]


class RecordEncoder:
    """Tokenises records as the processor does.

    Args:
        processor: has the tokenizers.
        stage: for prompt and lengths.
        with_prompt: whether the LLM reads the prompt text in this stage.

    Attributes:
        cut: how many "sources", "prompts" and "targets" were too long, and cut.

    Raises:
        ValueError: the prompt "chat", and the LLM's tokenizer has no chat template.
    """

    def __init__(self, processor: LayAlignProcessor, stage: StageRecipe, with_prompt: bool):
        self.processor = processor
        self.limits = {"source": stage.source_max_length, "target": stage.target_max_length}
        self.template = stage_template(stage, processor.tokenizer) if with_prompt else None
        self.told_languages = takes_source_language(processor.encoder_tokenizer)
        self.cut: Counter[str] = Counter()
        self._seen: set[str] = set()

    def encode(self, lines: Sequence[Line]) -> Chunk:
        """Tokenise some records.

        Raises:
            ValueError: a prompt that names the language of a record whose language has no known name, or an encoder that is
                told languages and does not know a record's.
        """
        sources = [line.record["source"] for line in lines]
        languages = [line.record["lang"] for line in lines]
        if not self._seen.issuperset(languages):
            self._check_languages(lines)
        questions = self._questions(sources, languages if self.told_languages else None)
        prompts = None
        if self.template is not None:
            fill = filler(self.template)
            prompts = [fill(line.record) for line in lines]
        texts, prompt_lengths = [], []
        longest_prompt, longest_target = self.limits["source"], self.limits["target"]
        for prompt, target in self.processor.text_rows(prompts, [line.record["target"] for line in lines]):
            self.cut["prompts"] += len(prompt) > longest_prompt
            self.cut["targets"] += len(target) > longest_target
            prompt = prompt[-longest_prompt:]
            texts.append(prompt + target[:longest_target])
            prompt_lengths.append(len(prompt))
        return Chunk(*_flat(questions), *_flat(texts), np.array(prompt_lengths, np.int32), languages)

    def encode_all(self, lines: Iterable[Line]) -> Iterator[Chunk]:
        """Tokenise records as they come, some at a time."""
        lines = iter(lines)
        while some := list(itertools.islice(lines, _CHUNK)):
            yield self.encode(some)

    def report_cut(self, name: str, count: int, cut: dict[str, int] | None = None) -> None:
        """Warn of what was cut.

        Args:
            name: what the records are called.
            count: of all records.
            cut: instead of `self.cut`, what was cut when they were tokenised.
        """
        for what in ("sources", "prompts", "targets"):
            if number := (self.cut if cut is None else cut).get(what):
                limit = self.limits["target" if what == "targets" else "source"]
                logger.warning("%s: %d of %d %s cut to %d tokens", name, number, count, what, limit)

    def identity(self) -> dict[str, Any]:
        """All but the records that the ids depend on."""
        tokenizer_of = {"encoder": self.processor.encoder_tokenizer, "llm": self.processor.tokenizer}
        return {
            **{name: _tokenizer_hash(tokenizer) for name, tokenizer in tokenizer_of.items()},
            "template": self.template,
            "encoder_template": self.processor.encoder_template,
            "limits": self.limits,
            "versions": [transformers.__version__, tokenizers.__version__],
        }

    def _questions(self, sources: list[str], languages: list[str] | None) -> list[list[int]]:
        """First without a limit, so that what is cut can be counted. The tokenizer itself cuts, for it knows what to keep
        at the end."""
        longest = self.limits["source"]
        questions = self.processor.encoder_rows(sources, languages)
        long = [place for place, ids in enumerate(questions) if len(ids) > longest]
        if long:
            self.cut["sources"] += len(long)
            again = None if languages is None else [languages[place] for place in long]
            short = self.processor.encoder_rows([sources[place] for place in long], again, longest)
            for place, ids in zip(long, short, strict=True):
                questions[place] = ids
        return questions

    def _check_languages(self, lines: Sequence[Line]) -> None:
        """Look at each language once, at its first record, whose place the message can name."""
        for line in lines:
            language = line.record["lang"]
            if language in self._seen:
                continue
            try:
                if self.told_languages:
                    source_code(self.processor.encoder_tokenizer, language)
                if self.template is not None:
                    fill_prompt(self.template, line.record)
            except ValueError as error:
                raise ValueError(f"{line.place}: {error}") from None
            self._seen.add(language)


def encode_records(
    lines: Iterable[Line],
    encoder: RecordEncoder,
    progress: bool = False,
    name: str = "records",
    total: int | None = None,
) -> EncodedRecords:
    """Tokenise records into memory.

    Args:
        lines: the records.
        encoder: tokenises them.
        progress: show a bar where there are many.
        name: what the bar and the warnings call them.
        total: how many there are.

    Raises:
        ValueError: as `RecordEncoder.encode`; no records.
    """
    chunks = []
    with bar(name, total, progress) as shown:
        for chunk in encoder.encode_all(lines):
            chunks.append(chunk)
            shown.update(len(chunk.languages))
    if not chunks:
        raise ValueError(f"{name}: no records")
    questions, question_lengths, texts, text_lengths, prompt_lengths, languages = zip(*chunks, strict=True)
    codes = list(itertools.chain.from_iterable(languages))
    names = list(dict.fromkeys(codes))
    place_of = {language: place for place, language in enumerate(names)}
    encoder.report_cut(name, len(codes))
    return EncodedRecords(
        Rows(np.concatenate(questions), _begins(question_lengths)),
        Rows(np.concatenate(texts), _begins(text_lengths)),
        np.concatenate(prompt_lengths),
        np.array([place_of[language] for language in codes], np.uint16),
        names,
    )


def bar(name: str, total: int | None, progress: bool) -> tqdm:
    """The bar of tokenising, where there are many records or nobody knows how many."""
    hidden = not progress or (total is not None and total < _BAR_FROM)
    return tqdm(desc=f"tokenise {name}", total=total, disable=hidden, dynamic_ncols=True, unit=" records", delay=0.5)


def _flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths


def _begins(lengths: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)


def _tokenizer_hash(tokenizer: Any) -> str:
    """Hash of all files that a tokenizer is saved as, but for the padding and cutting that its last call has left in it."""
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if not path.is_file():
                continue
            content = path.read_bytes()
            if path.name == "tokenizer.json":
                values = json.loads(content) | {"truncation": None, "padding": None}
                content = json.dumps(values, sort_keys=True).encode()
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()
