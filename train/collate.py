"""From records to batches: every record is tokenised once, up front, and batches are padded when they are asked for."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from layalign.source_languages import takes_source_language
from layalign.train.prompts import fill_prompt, stage_template

if TYPE_CHECKING:
    from layalign.processor import LayAlignProcessor
    from layalign.train.recipe import StageRecipe

logger = logging.getLogger(__name__)

_CHUNK = 256
_BAR_FROM = 5000


class Rows(NamedTuple):
    """Token ids of n records in one int32 array, and where each record begins (n + 1)."""

    ids: np.ndarray
    begins: np.ndarray

    def row(self, index: int) -> np.ndarray:
        """The ids of one record."""
        return self.ids[self.begins[index] : self.begins[index + 1]]

    def lengths(self) -> np.ndarray:
        """(n,) tokens of each record."""
        return np.diff(self.begins)


class EncodedRecord(NamedTuple):
    """One record's encoder tokens, its LLM tokens, and how many of the latter are prompt."""

    question: np.ndarray
    text: np.ndarray
    prompt_length: int


class EncodedRecords(torch.utils.data.Dataset):
    """Tokenised records, as flat arrays (a million records in a few hundred MB).

    Attributes:
        questions: tokens of the encoder.
        texts: tokens of the LLM: the prompt's, then the target's.
        prompt_lengths: (n,) how many of a record's LLM tokens are prompt.
    """

    def __init__(self, questions: Rows, texts: Rows, prompt_lengths: np.ndarray):
        self.questions, self.texts, self.prompt_lengths = questions, texts, prompt_lengths

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, index: int) -> EncodedRecord:
        return EncodedRecord(self.questions.row(index), self.texts.row(index), self.prompt_lengths[index])

    @property
    def lengths(self) -> np.ndarray:
        """(n,) positions each record takes in the LLM."""
        return self.questions.lengths() + self.texts.lengths()

    def digest(self) -> str:
        """Hash of all token ids, which tells whether the data is still what a run began with."""
        digest = hashlib.sha256()
        for array in (*self.questions, *self.texts, self.prompt_lengths):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


class StageData(NamedTuple):
    """What a stage trains on, and what it is evaluated on."""

    train: EncodedRecords
    held_out: EncodedRecords | None


def encode_records(
    records: Sequence[dict[str, str]],
    processor: LayAlignProcessor,
    stage: StageRecipe,
    with_prompt: bool,
    progress: bool = False,
    name: str = "records",
) -> EncodedRecords:
    """Tokenise records as the processor does, prompt and target each cut to its own length.

    Args:
        records: {"source", "target", "lang"} each.
        processor: tokenises them.
        stage: for prompt and lengths.
        with_prompt: whether the LLM reads the prompt text in this stage.
        progress: show a bar where there are many.
        name: what the bar and the warnings call them.

    Raises:
        ValueError: a prompt that names the language of a record whose language has no known name, or an encoder that is told
            languages and does not know a record's.
    """
    template = stage_template(stage, processor.tokenizer) if with_prompt else None
    told_languages = takes_source_language(processor.encoder_tokenizer)
    questions, texts, prompt_lengths = _Ragged(), _Ragged(), []
    cut = {"sources": 0, "prompts": 0, "targets": 0}
    starts = range(0, len(records), _CHUNK)
    for start in tqdm(starts, f"tokenise {name}", disable=not progress or len(records) < _BAR_FROM, dynamic_ncols=True):
        chunk = records[start : start + _CHUNK]
        sources, targets = [record["source"] for record in chunk], [record["target"] for record in chunk]
        prompts = None if template is None else [fill_prompt(template, record) for record in chunk]
        lang = [record["lang"] for record in chunk] if told_languages else None
        # First without limits, so that what is cut can be counted. The tokenizer itself cuts the sources, for it knows
        # what to keep at their end.
        batch = {
            key: value.numpy() for key, value in processor(sources, prompt=prompts, target=targets, lang=lang).items()
        }
        if batch["encoder_attention_mask"].sum(1).max() > stage.source_max_length:
            cut["sources"] += int((batch["encoder_attention_mask"].sum(1) > stage.source_max_length).sum())
            short = processor(sources, prompt=None, encoder_max_length=stage.source_max_length, lang=lang)
            batch |= {key: value.numpy() for key, value in short.items()}
        questions.add(batch["encoder_input_ids"], batch["encoder_attention_mask"] > 0)

        real, is_target = batch["attention_mask"] > 0, batch["labels"] != -100
        place = real.cumsum(1) - 1
        prompt_length, target_length = (real & ~is_target).sum(1), is_target.sum(1)
        cut["prompts"] += int((prompt_length > stage.source_max_length).sum())
        cut["targets"] += int((target_length > stage.target_max_length).sum())
        first = np.maximum(prompt_length - stage.source_max_length, 0)
        kept = real & (place >= first[:, None]) & (place < (prompt_length + stage.target_max_length)[:, None])
        texts.add(batch["input_ids"], kept)
        prompt_lengths.append(prompt_length - first)
    for what, count in cut.items():
        if count:
            limit = stage.target_max_length if what == "targets" else stage.source_max_length
            logger.warning("%s: %d of %d %s cut to %d tokens", name, count, len(records), what, limit)
    return EncodedRecords(questions.rows(), texts.rows(), np.concatenate(prompt_lengths).astype(np.int32))


class Collator:
    """Pads rows of EncodedRecords to a batch for the model's forward call, labels included.

    Args:
        encoder_padding, padding: token ids that fill up the encoder's and the LLM's rows (masked, so any id does).
    """

    def __init__(self, encoder_padding: int = 0, padding: int = 0):
        self.encoder_padding, self.padding = encoder_padding, padding

    def __call__(self, rows: Sequence[EncodedRecord]) -> dict[str, torch.Tensor]:
        questions, texts, prompt_lengths = zip(*rows, strict=True)
        encoder_ids, encoder_mask = _pad(questions, self.encoder_padding)
        ids, mask = _pad(texts, self.padding)
        is_target = mask.astype(bool) & (np.arange(ids.shape[1]) >= np.asarray(prompt_lengths)[:, None])
        batch = {
            "encoder_input_ids": encoder_ids,
            "encoder_attention_mask": encoder_mask,
            "input_ids": ids,
            "attention_mask": mask,
            "labels": np.where(is_target, ids, -100),
        }
        return {key: torch.from_numpy(value) for key, value in batch.items()}


class _Ragged:
    """Collects rows of different length."""

    def __init__(self):
        self.ids, self.lengths = [], []

    def add(self, ids, kept):
        self.ids.append(ids[kept].astype(np.int32))
        self.lengths.append(kept.sum(1))

    def rows(self):
        begins = np.concatenate([[0], np.cumsum(np.concatenate(self.lengths))]).astype(np.int64)
        return Rows(np.concatenate(self.ids), begins)


def _pad(rows, value):
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), value, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return ids, mask
