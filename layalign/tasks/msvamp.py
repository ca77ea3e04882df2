"""MSVAMP: arithmetic word problems in ten languages, a file of JSON lines each."""

from layalign.languages import PAPER_LANGUAGES
from layalign.tasks import prompts
from layalign.tasks.language_files import LanguageFiles
from layalign.tasks.task import Task
from layalign.tasks.word_problems import SCORING, word_problem

FILES = LanguageFiles(
    task="msvamp",
    hub="Mathoctopus/MSVAMP",
    problem=word_problem,
    places=("msvamp", "", "evaluation/msvamp"),
    patterns=("test_{name}.jsonl", "test_{name}.json"),
    hub_files=PAPER_LANGUAGES,
)
TASK = Task(name=FILES.task, load=FILES.load, scoring=SCORING, prompt=prompts.MATH)
