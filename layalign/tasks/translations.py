"""Scoring of translations by sacrebleu: BLEU, spBLEU where its tokenizer is there, chrF++.

spBLEU needs the `sentencepiece` package and FLORES-200's model. It is taken from the file that LAYALIGN_SPBLEU_MODEL names,
or from where sacrebleu keeps it; it is never downloaded, as an evaluation may have no network. Without it spBLEU is left
out, and `notes` says so.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layalign.tasks.task import Record, Scores, Statistics, of_languages

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric

MODEL = "LAYALIGN_SPBLEU_MODEL"


class Translations:
    """Corpus scores of translations against one reference each; an answer alone has none.

    bleu: sacrebleu's BLEU with its 13a tokenizer. spbleu: with FLORES-200's. chrf++: characters to 6, words to 2.
    """

    def fields(self, prediction: str, answer: str) -> dict[str, Any]:
        """Nothing: a sentence is not scored alone."""
        return {}

    def scores(self, records: Iterable[Record]) -> Scores:
        """sacrebleu's corpus scores, 0 to 100."""
        scores: Scores = {name: {} for name in self._metrics}
        for lang, found in of_languages(records).items():
            predictions, references = _texts(found)
            for name, metric in self._metrics.items():
                scores[name][lang] = metric.corpus_score(predictions, [references]).score
        return scores

    def statistics(self, records: Sequence[Record]) -> dict[str, Statistics]:
        """What sacrebleu sums over sentences, and its score of the sum."""
        predictions, references = _texts(records)

        def score_of(metric: Metric) -> Callable[[Sequence[float]], float]:
            return lambda total: metric._compute_score_from_stats([round(value) for value in total]).score

        return {
            name: Statistics(metric._extract_corpus_statistics(predictions, [references]), score_of(metric))
            for name, metric in self._metrics.items()
        }

    def signatures(self) -> dict[str, str]:
        """{scorer: sacrebleu's signature}, without which a score cannot be compared."""
        found = {}
        for name, metric in self._metrics.items():
            metric.corpus_score(["a"], [["a"]])  # it has none before something is scored
            found[name] = str(metric.get_signature())
        return found

    def notes(self) -> list[str]:
        """What was left out, and why."""
        why = self._tokenizer[1]
        return [f"spBLEU is left out: {why}."] if why else []

    @cached_property
    def _tokenizer(self) -> tuple[Path | None, str | None]:
        """FLORES-200's model, or why there is none."""
        from sacrebleu.tokenizers.tokenizer_spm import SACREBLEU_DIR, SPM_MODELS

        named = os.environ.get(MODEL)
        kept = Path(SACREBLEU_DIR) / "models" / os.path.basename(SPM_MODELS["flores200"]["url"])
        path = Path(named) if named else kept
        if find_spec("sentencepiece") is None:
            return None, "the package sentencepiece is not installed"
        if not path.is_file():
            from_where = f"; set {MODEL} to it, or download {SPM_MODELS['flores200']['url']} there" if not named else ""
            return None, f"its tokenizer's model {path} is not there{from_where}"
        return path, None

    @cached_property
    def _metrics(self) -> dict[str, Metric]:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF

        found: dict[str, Metric] = {"bleu": BLEU(tokenize="13a", force=True)}
        if model := self._tokenizer[0]:
            found["spbleu"] = by_pieces = BLEU(tokenize="none", force=True)
            by_pieces.tokenizer = _pieces(model)
            by_pieces.tokenizer_signature = by_pieces.tokenizer.signature()
        found["chrf++"] = CHRF(word_order=2)
        return found


def _pieces(model: Path) -> Any:
    """A tokenizer of sacrebleu's kind that cuts texts into the pieces of a SentencePiece model."""
    import sentencepiece
    from sacrebleu.tokenizers.tokenizer_base import BaseTokenizer
    from sacrebleu.tokenizers.tokenizer_spm import SPM_MODELS

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    usual = os.path.basename(SPM_MODELS["flores200"]["url"])
    name = "flores200" if model.name == usual else f"spm:{hashlib.sha256(model.read_bytes()).hexdigest()[:12]}"

    class Pieces(BaseTokenizer):
        """Texts as pieces with spaces between them."""

        def signature(self) -> str:
            return name

        def __call__(self, line: str) -> str:
            return " ".join(pieces.encode(line, out_type=str))

    return Pieces()


def _texts(records: Sequence[Record]) -> tuple[list[str], list[str]]:
    return [record["prediction"].strip() for record in records], [record["answer"].strip() for record in records]
