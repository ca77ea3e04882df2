"""Evaluation tasks, one file each: where its problems are, how a row is read, how an answer is scored."""

from layalign.tasks.registry import find_task, load_task, load_tasks
from layalign.tasks.task import Loader, Scoring, Task, Verdicts

__all__ = ["Loader", "Scoring", "Task", "Verdicts", "find_task", "load_task", "load_tasks"]
