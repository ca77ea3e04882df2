"""The trained part that comes with the package, joined to the two bases and asked questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from layalign.folders import damage
from layalign.generation.texts import Answerer
from layalign.model import LayAlignForConditionalGeneration
from layalign.processor import LayAlignProcessor
from layalign.train.demo.problems import REAL
from layalign.train.demo.real.bases import encoder_folder, llm_folder

SHIPPED = Path(__file__).with_name("trained")
ANSWER_TOKENS = 48
# In languages that the answers are not in, so that the demonstration translates too; none is in a training record.
SENTENCES = ("Кошка играет с мышью.", "Je ne savais pas que tu avais autant d'argent.", "Wanaume wakakwenda kazini.")


def load_shipped(
    folder: str | Path = SHIPPED, cache: str | Path | None = None
) -> tuple[LayAlignForConditionalGeneration, LayAlignProcessor]:
    """The shipped LayAlign model and its processor; the bases are fetched and converted where the cache lacks them.

    Args:
        folder: of the trained part.
        cache: of the bases.

    Raises:
        ValueError: nothing shipped or a damaged file, a package that cannot be had, bases that do not fit.
    """
    if (reason := damage(folder)) is not None:
        raise ValueError(f"no trained part in {folder}: {reason}")
    bases = str(encoder_folder(cache)), str(llm_folder(cache))
    model = LayAlignForConditionalGeneration.from_pretrained(folder, encoder=bases[0], llm=bases[1])
    return model, LayAlignProcessor.from_bases(*bases)


def answer_shipped(
    questions: Sequence[str] | None = None, folder: str | Path = SHIPPED, cache: str | Path | None = None
) -> list[str]:
    """Answer with the shipped part, print every question and answer, and return the answers.

    Args:
        questions: None: a held-out problem for each language, whose right answer is printed too, and SENTENCES, which it translates.
        folder, cache: as of `load_shipped`.
    """
    model, processor = load_shipped(folder, cache)
    chosen = [{"question": question} for question in questions or SENTENCES]
    chosen = chosen if questions else [*_one_of_each_language(), *chosen]
    answer = Answerer(model, processor, max_new_tokens=ANSWER_TOKENS)
    answers = answer([row["question"] for row in chosen])
    for row, text in zip(chosen, answers, strict=True):
        expected = f"   (right: {row['answer']})" if "answer" in row else ""
        print(f"{row['question']}\n    -> {text}{expected}")
    return answers


def _one_of_each_language() -> list[dict]:
    """Held-out problems, another one in every language."""
    rows = REAL.evaluation_problems(len(REAL.languages), "shown")
    return [row for row in rows if row["index"] == REAL.languages.index(row["lang"])]
