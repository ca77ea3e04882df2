"""Reading evaluation problems: MGSM, MSVAMP, and JSON lines of one's own.

A problem is a dict: `task`, `lang` (two letters), `index` (its place in its language, from 0), `question` (str) and
`answer` (int or float).
"""

import json
from itertools import islice
from pathlib import Path

from layalign.evaluation.scoring import exact_answer

LANGUAGES = {
    "bn": "Bengali",
    "th": "Thai",
    "sw": "Swahili",
    "ja": "Japanese",
    "zh": "Chinese",
    "de": "German",
    "fr": "French",
    "ru": "Russian",
    "es": "Spanish",
    "en": "English",
    "te": "Telugu",
}
HUB_NAMES = {"mgsm": "juletxara/mgsm", "msvamp": "Mathoctopus/MSVAMP"}
FILE_PATTERNS = {
    "mgsm": ("mgsm_{code}.tsv",),
    "msvamp": ("test_{name}.jsonl", "test_{name}.json"),
}
QUESTION_FIELDS = ("m_query", "question")
ANSWER_FIELDS = ("answer_number", "response", "answer")


def load_task(task, data=None, languages=None, limit=None):
    """The problems of one task, languages in the paper's order.

    task: "mgsm", "msvamp", "problems", or the path of a JSON-lines file with the fields question, answer and lang.
    data: for mgsm and msvamp a folder that holds the task's files (itself or in a folder named after the task), or a
        name that `datasets.load_dataset` takes, with "datasets:" before it if a folder of that name exists; None: the
        usual name on the hub. For problems such a JSON-lines file, or a folder with problems.jsonl.
    languages: two-letter codes, None for all; limit: problems taken per language, from the start, None for all.

    Raises ValueError for an unknown task or language, a missing or empty file, and a bad row (with file and line).
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit: got {limit!r}, takes a positive int or None")
    if isinstance(languages, str):
        raise ValueError(f"languages: got the string {languages!r}, takes a list of two-letter codes")
    if task == "problems":
        if data is None:
            raise ValueError("data: problems takes a JSON-lines file, got None")
        return _own_problems(Path(data) / "problems.jsonl" if Path(data).is_dir() else Path(data), languages, limit)
    if task not in FILE_PATTERNS:
        if not str(task).endswith((".jsonl", ".json")):
            raise ValueError(f"task: got {task!r}, takes 'mgsm', 'msvamp', 'problems' or the path of a .jsonl file")
        return _own_problems(Path(task), languages, limit)
    source = HUB_NAMES[task] if data is None else str(data)
    folder = Path(source)
    if source.startswith("datasets:") or not (folder.exists() or _looks_like_a_path(source)):
        return _from_datasets(task, source.removeprefix("datasets:"), languages, limit)
    files = _files(task, folder)
    return _select(task, {code: islice(_read(path), limit) for code, path in _chosen(files, languages, folder)})


def _looks_like_a_path(source):
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source


def _files(task, folder):
    """{language: file} of `task` in `folder`."""
    if not folder.is_dir():
        raise ValueError(f"data: {folder} is not a folder; {task} takes a folder or a datasets name")
    for place in (folder / task, folder):
        found = {}
        for code, name in LANGUAGES.items():
            for pattern in FILE_PATTERNS[task]:
                path = place / pattern.format(code=code, name=name)
                if path.is_file():
                    found.setdefault(code, path)
        if found:
            return found
    raise ValueError(f"data: {folder} holds no file named like {' or '.join(FILE_PATTERNS[task])} for {task}")


def _chosen(available, languages, where):
    """(language, value) of the languages asked for, in the paper's order, others after it by name."""
    if languages is not None:
        if not languages:
            raise ValueError("languages: got an empty list, takes codes such as 'sw', or None for all")
        missing = [code for code in languages if code not in available]
        if missing:
            raise ValueError(f"languages: {', '.join(missing)} not in {where}, which has {', '.join(available)}")
    order = [*LANGUAGES, *sorted(set(available) - set(LANGUAGES))]
    return [(code, available[code]) for code in order if code in available and (languages is None or code in languages)]


def _select(task, rows_by_language):
    return [
        {"task": task, "lang": code, "index": index, "question": question, "answer": answer}
        for code, rows in rows_by_language.items()
        for index, (question, answer) in enumerate(rows)
    ]


def _lines(path):
    """(place, text) of each line of a UTF-8 file; empty lines at its end are not lines."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n").split(b"\n")
    if lines == [b""]:
        raise ValueError(f"{path}: the file is empty")
    for number, line in enumerate(lines, 1):
        try:
            yield f"{path}:{number}", line.rstrip(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _read(path):
    """(question, answer) of each line of an MGSM or MSVAMP file."""
    for place, line in _lines(path):
        if path.suffix == ".tsv":
            fields = line.split("\t")
            if len(fields) != 2:
                raise ValueError(f"{place}: got {len(fields)} tab-separated fields, takes a question and an answer")
            question, answer = fields
        else:
            row = _json_object(place, line)
            question, answer = _field(place, row, QUESTION_FIELDS), _field(place, row, ANSWER_FIELDS)
        yield _question(place, question), _answer(place, answer)


def _own_problems(path, languages, limit):
    """The problems of a JSON-lines file with question, answer and lang; the limit counts per language."""
    rows = {}
    for place, line in _lines(path):
        row = _json_object(place, line)
        lang = _field(place, row, ("lang",))
        if not isinstance(lang, str) or not lang.strip():
            raise ValueError(f"{place}: lang: got {lang!r}, takes a language code")
        question = _question(place, _field(place, row, ("question",)))
        rows.setdefault(lang, []).append((question, _answer(place, _field(place, row, ("answer",)))))
    return _select(path.stem, {code: found[:limit] for code, found in _chosen(rows, languages, path)})


def _from_datasets(task, name, languages, limit):
    """The test split of a dataset with one configuration per language, or with one file per language."""
    import datasets

    try:
        available = _configurations(task, name, datasets)
        chosen = _chosen(available, languages, name)
        rows = {
            code: _dataset_rows(f"{name} ({code})", datasets.load_dataset(**arguments, split=split), limit)
            for code, (arguments, split) in chosen
        }
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"data: {task} could not be loaded as the dataset {name!r} ({str(error).splitlines()[0]}); "
            f"give data= a folder with files named like {FILE_PATTERNS[task][0]}"
        ) from error
    return _select(task, rows)


def _configurations(task, name, datasets):
    """{language: (arguments of load_dataset, split)}."""
    place = {"path": name}
    try:
        configurations = datasets.get_dataset_config_names(name)
    except RuntimeError:
        # A dataset that is still a script: the hub keeps a converted copy of its rows on a branch of its own.
        place["revision"] = "refs/convert/parquet"
        configurations = datasets.get_dataset_config_names(name, revision=place["revision"])
    found = {
        code: ({**place, "name": label}, "test")
        for code, language in LANGUAGES.items()
        for label in (code, language)
        if label in configurations
    }
    if found:
        return found
    pattern = FILE_PATTERNS[task][-1]
    known = [code for code in LANGUAGES if task == "mgsm" or code != "te"]
    files = {code: pattern.format(code=code, name=LANGUAGES[code]) for code in known}
    return {code: ({**place, "data_files": {"test": file}}, "test") for code, file in files.items()}


def _dataset_rows(where, rows, limit):
    for index, row in enumerate(islice(rows, limit)):
        place = f"{where}, row {index}"
        question, answer = _field(place, row, QUESTION_FIELDS), _field(place, row, ANSWER_FIELDS)
        yield _question(place, question), _answer(place, answer)


def _json_object(place, line):
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: got a {type(row).__name__}, takes a JSON object per line")
    return row


def _field(place, row, names):
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"{place}: no field {' or '.join(names)}; it has {', '.join(map(str, row)) or 'none'}")


def _question(place, question):
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{place}: question: got {question!r}, takes a text that is not empty")
    return question.strip()


def _answer(place, answer):
    try:
        number = exact_answer(answer)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return int(number) if number == number.to_integral_value() else float(number)
