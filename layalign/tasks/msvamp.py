"""MSVAMP: arithmetic word problems in ten languages, a file of JSON lines each."""

from layalign.languages import MATHEMATICS, PAPER_LANGUAGES
from layalign.tasks.reading import LanguageFiles
from layalign.tasks.task import Task
from layalign.tasks.word_problems import SCORING, word_problem

FILES = LanguageFiles(
    task="msvamp",
    hub="Mathoctopus/MSVAMP",
    patterns=("test_{name}.jsonl", "test_{name}.json"),
    languages=MATHEMATICS,
    hub_languages=PAPER_LANGUAGES,
    problem=word_problem,
)
TASK = Task(name=FILES.task, load=FILES.load, scoring=SCORING)
