"""What can be asked a task's questions, a file each: LayAlign, an LLM alone, translation before an LLM, MindMerger, LangBridge."""

from layalign.systems.baselines import PublishedBaseline
from layalign.systems.choice import chosen_system, system_at
from layalign.systems.examples import Example, read_examples
from layalign.systems.layalign_model import LayAlignModel
from layalign.systems.llm import LLM
from layalign.systems.system import System
from layalign.systems.translate_first import TranslateFirst

__all__ = [
    "LLM",
    "Example",
    "LayAlignModel",
    "PublishedBaseline",
    "System",
    "TranslateFirst",
    "chosen_system",
    "read_examples",
    "system_at",
]
