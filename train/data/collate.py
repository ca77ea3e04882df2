"""Tokenised records, and batches of them, which are padded when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from layalign.train.data.mixing import Mixture


class Rows(NamedTuple):
    """Token ids of n records in one int32 array, in memory or mapped from a file, and where each record begins (n + 1).

    With `chosen` (m,) int64 the rows are m of them, in that order.
    """

    ids: np.ndarray
    begins: np.ndarray
    chosen: np.ndarray | None = None

    def row(self, index: int) -> np.ndarray:
        """The ids of one record."""
        place = index if self.chosen is None else self.chosen[index]
        return self.ids[self.begins[place] : self.begins[place + 1]]

    def lengths(self) -> np.ndarray:
        """(n,) tokens of each record."""
        lengths = np.diff(self.begins)
        return lengths if self.chosen is None else lengths[self.chosen]


class EncodedRecord(NamedTuple):
    """One record's encoder tokens, its LLM tokens, and how many of the latter are prompt."""

    question: np.ndarray
    text: np.ndarray
    prompt_length: int


class EncodedRecords(torch.utils.data.Dataset):
    """Tokenised records, as flat arrays in memory or mapped from files.

    Args:
        questions: tokens of the encoder.
        texts: tokens of the LLM: the prompt's, then the target's.
        prompt_lengths: (n,) int32, how many of a record's LLM tokens are prompt.
        languages: (n,) uint16, the language of each record as a place in `language_names`; None: none is known of any.
        language_names: codes; "" for records without one.
        content: hash of these arrays, where it is known.

    Attributes:
        questions, texts, prompt_lengths, languages, language_names: as given.
        mixture: how many records of each language an epoch has; None: every record once.
        soft: whether the LLM reads a question as soft prompts; without an adapter it takes no position there.
    """

    def __init__(
        self,
        questions: Rows,
        texts: Rows,
        prompt_lengths: np.ndarray,
        languages: np.ndarray | None = None,
        language_names: Sequence[str] = ("",),
        content: str | None = None,
    ):
        self.questions, self.texts, self.prompt_lengths = questions, texts, prompt_lengths
        self.languages = np.zeros(len(prompt_lengths), np.uint16) if languages is None else languages
        self.language_names, self._content = tuple(language_names), content
        self.mixture: Mixture | None = None
        self.soft = True

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, index: int) -> EncodedRecord:
        return EncodedRecord(self.questions.row(index), self.texts.row(index), self.prompt_lengths[index])

    @property
    def lengths(self) -> np.ndarray:
        """(n,) positions each record takes in the LLM."""
        return self.questions.lengths() + self.texts.lengths() if self.soft else self.texts.lengths()

    def by_language(self) -> dict[str, np.ndarray]:
        """The places of each language's records, of those that have any, in alphabetical order; those without one are "unknown"."""
        places = {name: np.flatnonzero(self.languages == index) for index, name in enumerate(self.language_names)}
        return {name or "unknown": places[name] for name in sorted(places) if len(places[name])}

    def subset(self, index: np.ndarray) -> EncodedRecords:
        """Some of all the records (not of a subset's), without copying their tokens.

        Args:
            index: (m,) int64, which, in the order they shall have.
        """
        assert self.questions.chosen is None, "a subset of a subset"
        content = hashlib.sha256(self.digest().encode() + np.ascontiguousarray(index, np.int64).tobytes()).hexdigest()
        questions, texts = self.questions._replace(chosen=index), self.texts._replace(chosen=index)
        languages = self.languages[index]
        found = EncodedRecords(questions, texts, self.prompt_lengths[index], languages, self.language_names, content)
        found.soft = self.soft
        return found

    def digest(self) -> str:
        """Hash of all token ids and languages, which tells whether the data is still what a run began with."""
        if self._content is None:
            arrays = (*self.questions[:2], *self.texts[:2], self.prompt_lengths, self.languages)
            hashes = [hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() for array in arrays]
            self._content = content_hash(hashes, self.language_names)
        return self._content


def content_hash(arrays: Sequence[str], language_names: Sequence[str]) -> str:
    """What stands for a whole of arrays.

    Args:
        arrays: SHA-256 of the bytes of questions' ids and begins, texts' ids and begins, prompt lengths, languages.
        language_names: codes.
    """
    return hashlib.sha256("\n".join((*arrays, *language_names)).encode()).hexdigest()


class StageData(NamedTuple):
    """What a stage trains on, and what it is evaluated on."""

    train: EncodedRecords
    held_out: EncodedRecords | None


# A record without a label: what a batch without records is made of, so that all processes make as many forward calls.
_NOTHING = EncodedRecord(np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.int32), 1)


class Collator:
    """Pads rows of EncodedRecords to a batch for the model's forward call, labels included.

    Args:
        encoder_padding, padding: token ids that fill up the encoder's and the LLM's rows (masked, so any id does).
    """

    def __init__(self, encoder_padding: int = 0, padding: int = 0):
        self.encoder_padding, self.padding = encoder_padding, padding

    def __call__(self, rows: Sequence[EncodedRecord]) -> dict[str, torch.Tensor]:
        questions, texts, prompt_lengths = zip(*(rows or [_NOTHING]), strict=True)
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


class PackedCollator:
    """Rows of EncodedRecords end to end, as the model's forward call takes packed ones, labels included."""

    def __call__(self, rows: Sequence[EncodedRecord]) -> dict[str, torch.Tensor]:
        questions, texts, prompt_lengths = zip(*(rows or [_NOTHING]), strict=True)
        encoder_ids, encoder_ends = _join(questions)
        ids, ends = _join(texts)
        place = np.arange(len(ids)) - np.repeat(ends[:-1], np.diff(ends))
        is_target = place >= np.repeat(prompt_lengths, np.diff(ends))
        batch = {
            "encoder_input_ids": encoder_ids[None],
            "encoder_cu_seqlens": encoder_ends,
            "input_ids": ids[None],
            "cu_seqlens": ends,
            "labels": np.where(is_target, ids, -100)[None],
        }
        return {key: torch.from_numpy(value) for key, value in batch.items()}


def _pad(rows, value):
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), value, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return ids, mask


def _join(rows):
    ends = np.cumsum([0, *(len(row) for row in rows)]).astype(np.int32)
    return np.concatenate(rows).astype(np.int64), ends
