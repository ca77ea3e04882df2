"""The texts that the published checkpoints were trained on and asked with, verbatim.

Their source: sustech-nlp/LayAlign, tools/read_datasets.py (`construct_prompt_math`, `construct_prompt_mt`,
`construct_prompt_x_csqa`, `construct_prompt_xnli`). They are part of a checkpoint's format, as its special tokens are: not
a character of them changes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# What the LLM reads beside the encoder's tokens; {text} is the question.
MATH = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{text}\n\n### Response: Let's think step by step."
)
# {language} is the English name of the language of {text}.
TRANSLATION = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n"
    "### Instruction:\nTranslate the following sentences from {language} to English.\n"
    "### Input:\n{text}\n### Response:"
)
# X-CSQA and XNLI: encoder and LLM read the same text.
SAME_TEXT = "{text}"


def xcsqa(stem: str, choices: Sequence[str]) -> str:
    """What encoder and LLM read of an X-CSQA question; `choices` get the letters from A on."""
    lettered = "\t".join(f"{letter(place)}. {choice}" for place, choice in enumerate(choices))
    return f"{stem}\nOptions:{lettered}\nAnswer:"


def xnli(sentence1: str, sentence2: str) -> str:
    """What encoder and LLM read of a pair of XNLI, premise first."""
    return f"Premise: {sentence1}\nHypothesis: {sentence2}\nLabel:"


# What XCOPA's files ask of a premise, behind which it stands in English in each language.
COPA = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}

_ASKED = f"(?: (?:{'|'.join(map(re.escape, COPA.values()))}))?"
_PARTS = (
    re.compile(rf"(?P<part>.*?)(?P<rest>{_ASKED}\nOptions:A\. .*\nAnswer:)", re.DOTALL),
    re.compile(r"Premise: (?P<part>.*)(?P<rest>\nHypothesis: .*\nLabel:)", re.DOTALL),
)
_OPTION = re.compile(rf"(\t[A-Z]\. |{_ASKED}\nOptions:A\. |\nHypothesis: |\nAnswer:|\nLabel:)")


def parts(question: str) -> list[str]:
    """What a question is made of, the prompt's own words at even places and what a person wrote at odd ones.

    "".join of it is `question`. A question of neither `xcsqa` (nor XCOPA) nor `xnli` is all a person's.
    """
    for pattern in _PARTS:
        if found := pattern.fullmatch(question):
            first, written, rest = question[: found.start("part")], found["part"], found["rest"]
            return [first, written, *_OPTION.split(rest)[1:-1]]
    return ["", question]


def letter(place: int) -> str:
    """The letter of a choice, "A" for 0."""
    return chr(ord("A") + place)
