"""The evaluation loop, and the evaluation of a saved model into a folder of results."""

import hashlib
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from layalign.evaluation import report
from layalign.evaluation.scoring import SCORERS, official_number, strict_number
from layalign.evaluation.tasks import load_task
from layalign.journal import Journal
from layalign.kernels.files import write_text

DEFAULT_PROMPT = "default"


def evaluate_problems(answer, problems, batch_size=16, progress=True, keep=None):
    """Ask every problem and score the answers both ways.

    answer: callable, list of str questions -> list of str answers.
    problems: list of dicts with lang, question and answer (a number); other fields are carried along.
    batch_size: questions per call, longest first. progress: show a bar.
    keep: called with the new records (list of dict) after each batch.

    Returns {"accuracy": {"official": {lang: per cent}, "strict": {lang: per cent}}, "records": [...]}, one record per
    problem, in order: its fields and prediction (str), official, strict (bool), official_number (float), strict_number
    (str or None).

    Raises ValueError for no problems, and where `answer` returns another number of answers.
    """
    if not problems:
        raise ValueError("problems: got none")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size!r}, takes a positive int")
    records = [None] * len(problems)
    longest_first = sorted(range(len(problems)), key=lambda place: -len(problems[place]["question"]))
    with tqdm(total=len(problems), unit="question", desc="evaluate", disable=not progress) as bar:
        for start in range(0, len(problems), batch_size):
            places = longest_first[start : start + batch_size]
            predictions = answer([problems[place]["question"] for place in places])
            if len(predictions) != len(places):
                raise ValueError(f"answer: got {len(predictions)} answers for {len(places)} questions")
            for place, prediction in zip(places, predictions, strict=True):
                records[place] = _record(problems[place], prediction)
            if keep is not None:
                keep([records[place] for place in places])
            bar.update(len(places))
    return {"accuracy": accuracy(records), "records": records}


def accuracy(records):
    """{scorer: {lang: per cent}} of records, languages in the order of their first record."""
    result = {}
    for scorer in SCORERS:
        verdicts = {}
        for record in records:
            verdicts.setdefault(record["lang"], []).append(record[scorer])
        result[scorer] = {lang: 100 * sum(found) / len(found) for lang, found in verdicts.items()}
    return result


def evaluate(
    model_path,
    tasks=("mgsm",),
    *,
    data=None,
    languages=None,
    limit=None,
    batch_size=16,
    max_new_tokens=512,
    output=None,
    dtype=None,
    device=None,
    prompt=DEFAULT_PROMPT,
    progress=True,
    **generate_kwargs,
):
    """Evaluate a saved model and write `output` (default: runs/evaluate/<model's name>).

    The folder gets records.jsonl (every question, answer and prediction, as it goes), results.json, table.md and
    accuracy_<task>.png. The same call after an interruption goes on where it stopped; a folder that holds another
    evaluation, or anything else, is refused.

    model_path: folder or hub name. tasks: list of task names. data: a folder or datasets name for all tasks, or a dict
        {task: one}. languages, limit: as in `tasks.load_task`.
    batch_size: changes the speed and no answer. dtype, device: as in `loading.load_model`.
    prompt: "default" for the processor's template, None for no LLM text, or a str with {text}.
    progress: show a bar, then the tables.
    generate_kwargs: to `Answerer` (encoder_max_length) and transformers' generate; greedy without them.

    Returns the content of results.json. Raises ValueError for anything missing or malformed.
    """
    from layalign.generation.texts import Answerer
    from layalign.loading import check_model_path, fingerprint, load_model
    from layalign.processor import DEFAULT

    check_model_path(model_path)
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    problems = load_problems(tasks, data, languages, limit)
    output = Path(output) if output else Path("runs") / "evaluate" / Path(model_path).name
    config = {
        "model": fingerprint(model_path),
        "tasks": tasks,
        "problems": hashlib.sha256(json.dumps(problems).encode()).hexdigest(),
        "languages": languages,
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "prompt": prompt,
        "dtype": dtype or "auto",
        "generate": {name: repr(value) for name, value in sorted(generate_kwargs.items())},
    }
    answering = {"prompt": DEFAULT if prompt == DEFAULT_PROMPT else prompt, "max_new_tokens": max_new_tokens}

    def load():
        return Answerer(*load_model(model_path, dtype, device), batch_size=batch_size, **answering, **generate_kwargs)

    records, seconds = _answered(load, problems, output, config, batch_size, progress)
    results = {
        "model": str(model_path),
        "tasks": {task: _task_results(task, records) for task in dict.fromkeys(record["task"] for record in records)},
        "config": {**config, "batch_size": batch_size},
        "versions": _versions(),
        "seconds": seconds,
    }
    _write_reports(results, output, Path(model_path).name, progress)
    return results


def load_problems(tasks, data=None, languages=None, limit=None):
    """The problems of several tasks (list of dict); `data` for all of them or as {task: data}."""
    if not tasks or len(set(tasks)) != len(tasks):
        raise ValueError(f"tasks: got {list(tasks)}, takes at least one, none twice")
    if isinstance(data, dict) and (unknown := sorted(set(data) - set(tasks))):
        raise ValueError(f"data: got {', '.join(unknown)}, not among the tasks {', '.join(tasks)}")
    problems = []
    for task in tasks:
        found = load_task(task, data.get(task) if isinstance(data, dict) else data, languages, limit)
        if any(problem["task"] == found[0]["task"] for problem in problems):
            raise ValueError(f"tasks: two are called {found[0]['task']}")
        problems += found
    return problems


def _answered(load, problems, output, config, batch_size, progress):
    """Records of all problems in order, and the seconds it took to make those that were missing."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: {output} is a file, takes a folder")
    found = output.iterdir() if output.exists() else ()
    names = {path.name for path in found if not path.name.endswith(".partial")}
    if "evaluation.json" not in names and names - {"records.jsonl"}:
        raise ValueError(f"output: {output} exists and holds no evaluation; choose another folder")
    with Journal(output / "records.jsonl", config, output / "evaluation.json") as journal:
        kept = {_key(record): record for record in journal.records}
        missing = [problem for problem in problems if _key(problem) not in kept]
        started = time.perf_counter()
        if missing:
            answerer = load()
            answerer.check(
                [problem["question"] for problem in missing],
                lambda place: "{}, {}, question {}".format(*_key(missing[place])),
            )
            evaluate_problems(answerer, missing, batch_size, progress, keep=journal.append)
        kept = {_key(record): record for record in journal.records}
        return [kept[_key(problem)] for problem in problems], time.perf_counter() - started


def _key(record):
    return record["task"], record["lang"], record["index"]


def _record(problem, prediction):
    number = strict_number(prediction)
    return {
        **problem,
        "prediction": prediction,
        **{name: scorer(prediction, problem["answer"]) for name, scorer in SCORERS.items()},
        "official_number": official_number(prediction),
        "strict_number": None if number is None else str(number),
    }


def _task_results(task, records):
    chosen = [record for record in records if record["task"] == task]
    scores = accuracy(chosen)
    counts = {}
    for record in chosen:
        counts[record["lang"]] = counts.get(record["lang"], 0) + 1
    return {
        "accuracy": scores,
        "summary": {scorer: report.summarize(by_language) for scorer, by_language in scores.items()},
        "counts": counts,
    }


def _versions():
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("layalign", "torch", "transformers")},
    }


def _write_reports(results, output, name, show):
    tables = []
    for task, found in results["tasks"].items():
        table = {f"{name} ({scorer} scorer)": scores for scorer, scores in found["accuracy"].items()}
        tables.append(report.markdown_table(table, title=task))
        report.plot_accuracy(table, output / f"accuracy_{task}.png", title=task)
        if show:
            report.print_table(table, title=task)
    write_text(output / "table.md", "\n".join(tables))
    write_text(output / "results.json", json.dumps(results, ensure_ascii=False, indent=2) + "\n")
