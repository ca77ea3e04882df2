"""How alike the tokens of two texts are in single layers of an encoder (the paper's Figure 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from layalign.model import LayAlignForConditionalGeneration
    from layalign.processor import LayAlignProcessor

MOST_TOKENS = 64  # of a text, for labels that can be read


@dataclass(frozen=True, kw_only=True)
class TokenPair:
    """Which two texts, and where they are compared.

    Attributes:
        texts: of the map's rows and of its columns; None: the shortest pair of the analysis.
        languages: theirs, for encoders that are told it; None: of `texts`, not said; else Chinese, which the paper shows, or the first
            language that there is, and English.
        layers: of the encoder; 0 are the embeddings. None: the first, the middle and the last layer.

    Raises:
        ValueError: not two texts with words, not two languages, or a layer below 0.
    """

    texts: Sequence[str] | None = None
    languages: Sequence[str] | None = None
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name, words in (("pair", self.texts), ("pair languages", self.languages)):
            if words is not None and (len(words) != 2 or not all(word.strip() for word in words)):
                raise ValueError(f"{name}: got {', '.join(map(repr, words))}; takes two")
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ValueError(f"pair layers: got {list(self.layers)}; takes numbers from 0, the embeddings")

    def check_depth(self, depth: int, name: str) -> None:
        """Refuse layers that an encoder has not.

        Args:
            depth: its number of layers.
            name: whose it is.

        Raises:
            ValueError: one is above the last.
        """
        if self.layers is not None and max(self.layers) > depth:
            raise ValueError(
                f"pair layers: got {max(self.layers)}; the encoder of {name} has 0, the embeddings, to {depth}"
            )

    def among(self, parallel: Mapping[str, Sequence[str]]) -> tuple[list[str], list[str | None]]:
        """The texts and their languages.

        Args:
            parallel: {lang: N texts}, of which a pair is taken where none is given.

        Raises:
            ValueError: a language that is not among them.
        """
        if self.texts is not None:
            return list(self.texts), list(self.languages or (None, None))
        first = "zh" if "zh" in parallel else next(lang for lang in parallel if lang != "en")
        languages = list(self.languages or (first, "en"))
        if missing := [lang for lang in languages if lang not in parallel]:
            raise ValueError(f"pair languages: got {missing[0]}; the texts are in {', '.join(parallel)}")
        pairs = zip(*(parallel[lang] for lang in languages), strict=True)
        return list(min(pairs, key=lambda pair: max(map(len, pair)))), [*languages]


def token_map(
    model: LayAlignForConditionalGeneration,
    processor: LayAlignProcessor,
    texts: Sequence[str],
    languages: Sequence[str | None],
    layers: Sequence[int] | None = None,
    max_length: int | None = None,
) -> dict[str, Any]:
    """The cosine of each token of one text with each of the other; special tokens (end of sequence, language) are left out.

    Args:
        model, processor: LayAlign's.
        texts, languages: two of each, as `TokenPair.among` gives them.
        layers: see `TokenPair`.
        max_length: of what the encoder reads of a text, in tokens.

    Returns:
        {"tokens": [R texts, C texts], "counts": [how many tokens the texts have; the first MOST_TOKENS are shown], "layers",
        "cosine": (layers, R, C)}.

    Raises:
        ValueError: a text without tokens, or a layer that is not there.
    """
    tokenizer = processor.encoder_tokenizer
    tokens, rows, counts = [], [], []
    for text, lang in zip(texts, languages, strict=True):
        (ids,) = processor.encoder_rows([text], lang and [lang], max_length)
        marks = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        places = [place for place, token in enumerate(ids) if token not in marks]
        if not places:
            raise ValueError(f"pair: got {text!r}, of which the encoder reads no token")
        with torch.inference_mode():
            states = model.encoder_states(torch.tensor([ids], device=model.device), None).hidden_states
        counts.append(len(places))
        places = places[:MOST_TOKENS]
        tokens.append(readable(tokenizer, [ids[place] for place in places]))
        rows.append([normalize(state[0, places].float().cpu(), dim=-1) for state in states])
    depth = len(rows[0]) - 1
    chosen = sorted({1, max(1, depth // 2), depth}) if layers is None else list(dict.fromkeys(layers))
    TokenPair(layers=chosen).check_depth(depth, "the model")
    cosine = [(rows[0][layer] @ rows[1][layer].T).tolist() for layer in chosen]
    return {"tokens": tokens, "counts": counts, "layers": chosen, "cosine": cosine}


def readable(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Each token as it stands in a text; as the vocabulary has it where alone it is no text (a space, a part of a letter)."""
    found = []
    for token, name in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        text = tokenizer.decode([token]).strip()
        found.append(name if not text or "\N{REPLACEMENT CHARACTER}" in text else text)
    return found
