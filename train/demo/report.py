"""results.json, tables and plots of what the driver has finished, of either pair."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layalign.analysis.data import english_tables
from layalign.analysis.plots import plot_components, plot_english
from layalign.evaluation.report import markdown_table, plot_accuracy, plot_gates, plot_losses, print_table
from layalign.kernels.files import read_json, write_json, write_text
from layalign.train.demo.driver import DONE, kept, piece_file
from layalign.train.demo.systems import LLM_ALONE, SYSTEMS, TITLES
from layalign.train.run_folder import RECIPE
from layalign.versions import versions

TASKS = {
    "held_out": "Held-out problems: unseen combinations of patterns, unseen pairs of numbers",
    "new_wording": "Held-out problems: patterns never seen in training, unseen pairs of numbers",
    "hundred": "Held-out problems of one step, numbers up to 100",
    "two_steps": "Held-out problems of two steps, numbers up to 100",
    "msvamp": "MSVAMP, first questions",
    "msvamp_one": "MSVAMP, questions that need one operation",
    "mgsm": "MGSM, first questions",
}
LOSSES = {
    "loss_held_out": "answers to held-out problems",
    "loss_new_wording": "answers to problems of new wording",
    "loss_tatoeba": "LASER's Tatoeba, after the translation stage",
    "loss_tatoeba_task": "LASER's Tatoeba, after the task stage",
}
SHOTS_TITLES = TITLES | {LLM_ALONE: "LLM alone, 4-shot"}
Scores = dict[str, float]


@dataclass(frozen=True)
class Finished:
    """The LLM alone and the runs that are done.

    Attributes:
        folders: {run: its folder}, the LLM alone first.
        runs: {run: its done.json}, without the LLM alone.
    """

    folders: dict[str, Path]
    runs: dict[str, dict]

    @classmethod
    def among(cls, folders: Iterable[Path]) -> Finished:
        """Of these folders, the LLM's first, those with a done.json."""
        named = {folder.name: folder for folder in folders}
        done = {name: folder / DONE for name, folder in named.items() if name != LLM_ALONE}
        runs = {name: found for name, file in done.items() if (found := kept(file)) is not None}
        return cls({name: folder for name, folder in named.items() if name in runs or name == LLM_ALONE}, runs)

    def pieces(self, name: str) -> dict[str, Any]:
        """{run: this piece of its evaluation}, of those that have it."""
        files = {run: piece_file(folder, name) for run, folder in self.folders.items()}
        return {run: found for run, file in files.items() if (found := kept(file)) is not None}

    def draw(self, plots: Path, gates_title: str, titles: dict[str, str]) -> None:
        """The plots that every pair has: loss and gates.

        Args:
            plots: folder of the images.
            gates_title: above the gates.
            titles: {run: its name in the legends}.
        """
        if self.runs:
            losses = {titles[run]: done["history"] for run, done in self.runs.items()}
            plot_losses(losses, plots / "loss.png", "Training loss")
        if gates := {titles[run]: done["gates"] for run, done in self.runs.items() if done["gates"] is not None}:
            plot_gates(gates, plots / "gates.png", gates_title)


def write_demo(output: Path, folders: Iterable[Path], settings: dict) -> dict:
    """Write results.json and plots/ of the tiny pair's runs.

    Args:
        output: folder of the demo.
        folders: of the LLM alone and of each run, named as the system.
        settings: as results.json is to hold them, with the seed.

    Returns:
        what results.json holds.
    """
    finished = Finished.among(folders)
    answers = finished.pieces("held_out")
    accuracy = {name: found["accuracy"]["official"] for name, found in answers.items()}
    seconds = {}
    for name, found in answers.items():
        if name in finished.runs:
            seconds[f"{name}_training"] = sum(
                finished.runs[name]["seconds"][stage] for stage in ("translation", "task")
            )
        seconds[f"{name}_evaluation"] = found["seconds"]
    plots, table = output / "plots", {TITLES[name]: scores for name, scores in accuracy.items()}
    plot_accuracy(table, plots / "accuracy.png", "Generated word problems, held out: accuracy by language")
    finished.draw(plots, "LayAlign's gates after both stages", TITLES)
    seconds["total"] = sum(seconds.values())  # of all the calls that it took
    results = {
        "accuracy": accuracy,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "seed": settings["seed"],
        "settings": settings,
        "data": "generated word problems; evaluated on held-out pattern combinations and number pairs",
        "samples": {name: _samples(found["records"]) for name, found in answers.items()},
        "history": {TITLES[name]: done["history"] for name, done in finished.runs.items()},
    }
    write_json(output / "results.json", results, indent=2)
    return results


def show_demo(results: dict, output: Path) -> None:
    """Print the table of a demo, a few of LayAlign's answers and where everything is."""
    print()
    accuracy = {TITLES[name]: scores for name, scores in results["accuracy"].items()}
    print_table(accuracy, "Accuracy in per cent on generated problems")
    samples = results["samples"]["layalign"]
    for language, sample in samples.items():
        print(f"{language}: {sample['question']}\n    -> {sample['answer']}")
    question = samples["sw"]["question"]
    seconds = results["seconds"]["total"]
    print(
        f"\n{seconds:.0f} s of training and answering. Results, plots and the model are in {output}; ask it something:"
    )
    print(f'    layalign generate {output / "model"} "{question}"')


def write_experiment(output: Path, plan: dict, data_report: dict) -> dict:
    """Write results.json, table.md and plots/ of the real pair's runs and of the LLM alone in `output`.

    Args:
        output: folder of the experiment, with a folder `SYSTEM-SEED` for each run.
        plan: its steps and arguments; command and answers where it is not the first experiment.
        data_report: what it was trained on.

    Returns:
        what results.json holds: accuracy {task: {run: {lang: per cent}}} by the strict scorer; systems {task: {system:
        {"seeds", "languages": {lang: {"mean", "min", "max"}}, "mean", "spread"}}} where mean is over the languages but
        English and spread the sample standard deviation of that mean over seeds (None for one seed); understood {task:
        {run: {lang: per cent of answers whose sum is the right one, whatever the result}}}; english {run:
        `against_english` of the LLM's last layer, held-out problems}; loss, chrf, command, answers (what it was trained for), runs, data,
        versions.
    """
    finished = Finished.among([output / LLM_ALONE, *_run_folders(output)])
    accuracy = {
        task: {run: found["accuracy"]["strict"] for run, found in finished.pieces(task).items()} for task in TASKS
    }
    accuracy = {task: found for task, found in accuracy.items() if found}
    analyses = finished.pieces("analysis")
    results = {
        "accuracy": accuracy,
        "systems": {task: _by_system(found) for task, found in accuracy.items()},
        "understood": {task: _understood(finished.pieces(task)) for task in ("held_out", "new_wording")},
        "english": {run: found["english"]["llm"] for run, found in analyses.items()},
        "loss": {name: finished.pieces(name) for name in LOSSES},
        "chrf": {run: found["chrf"] for run, found in finished.pieces("chrf_tatoeba").items()},
        "chrf_task": {run: found["chrf"] for run, found in finished.pieces("chrf_tatoeba_task").items()},
        "runs": {
            run: {key: value for key, value in done.items() if key != "history"} | _begun_with(finished.folders[run])
            for run, done in finished.runs.items()
        },
        "command": plan.get("command", "python -m layalign.train.demo.real"),
        "answers": plan.get(
            "answers", "one-step word problems (addition, subtraction, numbers up to 20, in words or digits)"
        ),
        "steps": plan["steps"],
        "arguments": {key: value for key, value in plan["arguments"].items() if key != "data"},
        "data": data_report,
        "versions": versions(),
    }
    write_text(output / "table.md", experiment_tables(results))
    plots = output / "plots"
    finished.draw(plots, "Gates after training", {run: run for run in finished.runs})
    draw_systems(results, plots)
    if analyses:
        best = best_run(results, "layalign")
        runs = {"LLM alone": LLM_ALONE, f"LayAlign ({best})": best}
        shown = {title: analyses[run]["components"]["llm"] for title, run in runs.items() if run in analyses}
        if shown:
            plot_components(shown, plots / "components.png")
    write_json(output / "results.json", results)
    return results


def draw_systems(results: dict, plots: Path, tasks: Iterable[str] = tuple(TASKS)) -> None:
    """Of what `write_experiment` returns, the plots that show systems: accuracy_TASK.png of these tasks, english.png."""
    for task, systems in ((task, results["systems"][task]) for task in tasks if task in results["systems"]):
        plot_accuracy(_means(systems), plots / f"accuracy_{task}.png", TASKS[task])
    if results["english"]:
        plot_english(_english_by_system(results["english"]), plots / "english.png")


def joined(results: dict, earlier: dict) -> dict | None:
    """What `write_experiment` returned here and, of another machine or another day, there, as one; None where the experiments differ in
    command, data, steps, what was asked or what a system's runs began with. A run of both is the one here."""
    if any(results[name] != earlier[name] for name in ("command", "data", "steps", "arguments")):
        return None
    here, there = (
        {system_of(run): done.get("begun_with") for run, done in part["runs"].items()} for part in (results, earlier)
    )
    if any(here[system] != there[system] for system in here.keys() & there):
        return None

    def runs(name: str, *inner: str) -> dict[str, Any]:
        found = [whole[name] for whole in (earlier, results)]
        for key in inner:
            found = [part.get(key, {}) for part in found]
        return dict(sorted((found[0] | found[1]).items(), key=lambda item: _place(item[0])))

    both = {name: runs(name) for name in ("english", "chrf", "chrf_task", "runs")}
    for name in ("accuracy", "understood", "loss"):
        both[name] = {part: runs(name, part) for part in earlier[name] | results[name]}
    return results | both | {"systems": {task: _by_system(found) for task, found in both["accuracy"].items()}}


def best_run(results: dict, system: str) -> str | None:
    """The run of `system` with the best held-out accuracy, the mean of the languages but English; None where none is finished."""
    accuracy = results["accuracy"].get("held_out", {})
    means = {run: _mean_but_english(accuracy[run]) for run in accuracy if system_of(run) == system}
    return max(means, key=means.__getitem__, default=None)


def system_of(run: str) -> str:
    """The system of a run's name, SYSTEM-SEED or LLM_ALONE."""
    return run.rpartition("-")[0] or run


def _run_folders(output: Path) -> list[Path]:
    """In the order of the systems and seeds."""
    return sorted((file.parent for file in output.glob(f"*-*/{DONE}")), key=lambda folder: _place(folder.name))


def _begun_with(folder: Path) -> dict[str, str]:
    """{"begun_with": of the trained part that a run's training began with, twelve digits of its hash}; nothing where it began anew."""
    initial = read_json(folder / RECIPE).get("init_from")
    return {"begun_with": initial["sha256"][:12]} if initial else {}


def _place(run: str) -> tuple[int, int]:
    """Of a run among others: the LLM alone first, then by system and seed."""
    return (-1, 0) if run == LLM_ALONE else (list(SYSTEMS).index(system_of(run)), int(run.rpartition("-")[2]))


def _samples(records: list[dict]) -> dict[str, dict]:
    """{language: {"question", "answer", "expected"}} of the last problem in each language."""
    return {
        record["lang"]: {"question": record["question"], "answer": record["prediction"], "expected": record["answer"]}
        for record in records
    }


def _understood(pieces: dict[str, dict]) -> dict[str, Scores]:
    found = {}
    for run, result in pieces.items():
        verdicts: dict[str, list[bool]] = {}
        for record in result["records"]:
            right = record["prediction"].split("=")[0].split() == record["worked_answer"].split("=")[0].split()
            verdicts.setdefault(record["lang"], []).append(right)
        found[run] = {lang: 100 * statistics.mean(rows) for lang, rows in verdicts.items()}
    return found


def _by_system(accuracy: dict[str, Scores]) -> dict[str, dict]:
    found = {}
    for system, rows in _grouped(accuracy).items():
        by_language = {lang: [row[lang] for row in rows] for lang in rows[0]}
        means = [_mean_but_english(row) for row in rows]
        found[system] = {
            "seeds": len(rows),
            "languages": {
                lang: {"mean": statistics.mean(values), "min": min(values), "max": max(values)}
                for lang, values in by_language.items()
            },
            "mean": statistics.mean(means),
            "spread": statistics.stdev(means) if len(means) > 1 else None,
        }
    return found


def _english_by_system(english: dict[str, dict]) -> dict[str, dict]:
    """{title: {lang: {kind: mean over the system's runs}}} for the plot; here the LLM alone is shown no examples."""
    return {
        TITLES[system]: {
            lang: {kind: statistics.mean(run[lang][kind] for run in runs) for kind in kinds}
            for lang, kinds in runs[0].items()
        }
        for system, runs in _grouped(english).items()
    }


def _grouped(by_run: dict[str, Any]) -> dict[str, list]:
    grouped: dict[str, list] = {}
    for run, found in by_run.items():
        grouped.setdefault(system_of(run), []).append(found)
    return grouped


def _mean_but_english(scores: Scores) -> float:
    return statistics.mean(score for lang, score in scores.items() if lang != "en")


def _means(systems: dict[str, dict]) -> dict[str, Scores]:
    """{title: {lang: mean per cent}} for the tables and plots of the evaluation."""
    return {
        SHOTS_TITLES[system] + (f", {found['seeds']} seeds" if found["seeds"] > 1 else ""): {
            lang: values["mean"] for lang, values in found["languages"].items()
        }
        for system, found in systems.items()
    }


def experiment_tables(results: dict) -> str:
    """Everything that `write_experiment` returns, as Markdown tables."""
    tables = []
    for task, systems in results["systems"].items():
        tables.append(markdown_table(_means(systems), title=f"{TASKS[task]}: accuracy (%), strict scorer"))
        tables.append(_gain_table(systems))
    for task, found in results["understood"].items():
        if found:
            tables.append(markdown_table(found, title=f"{TASKS[task]}: the right sum (%), whatever its result"))
    if results["english"]:
        for title, table in english_tables(results["english"]).items():
            tables.append(markdown_table(table, f"Held-out problems, LLM's last layer, mean-pooled. {title}"))
    for name, losses in results["loss"].items():
        # A language with a single different answer has no loss.
        if losses := {run: kinds for run, kinds in losses.items() if kinds["true"]}:
            tables.append(loss_table(LOSSES[name], losses))
    for name, stage in (("chrf", "translation"), ("chrf_task", "task")):
        if chrf := {run: scores for run, scores in results[name].items() if scores}:
            title = f"LASER's Tatoeba into English: chrF, after the {stage} stage"
            tables.append(markdown_table(chrf, title=title))
    return "\n".join([*tables, _run_table(results["runs"])])


def _table(header: list[str], rows: list[list[str]], text_columns: int = 1, title: str | None = None) -> str:
    """A Markdown table, of which the columns behind the first ones are numbers."""
    marks = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, marks, *rows)]
    return "\n".join([*([f"## {title}", ""] if title else []), *lines]) + "\n"


def _gain_table(systems: dict[str, dict]) -> str:
    alone, rows = systems.get(LLM_ALONE), []
    for system, found in systems.items():
        spread = "-" if found["spread"] is None else f"{found['spread']:.1f}"
        least = "-" if alone is None else _least_gain(found["languages"], alone["languages"])
        rows.append([SHOTS_TITLES[system], f"{found['mean']:.1f}", spread, least])
    return _table(["system", "mean but English", "seeds' deviation", "gain over the LLM, least language"], rows)


def _least_gain(found: dict[str, Scores], alone: dict[str, Scores]) -> str:
    gains = {lang: values["mean"] - alone[lang]["mean"] for lang, values in found.items() if lang != "en"}
    lang = min(gains, key=gains.__getitem__)
    return f"{gains[lang]:+.1f} ({lang})"


def loss_table(title: str, losses: dict[str, dict[str, Scores]]) -> str:
    """A Markdown table of {run: {"true", "shuffled": {lang: nats a token}}}."""
    languages = list(next(iter(losses.values()))["true"])
    rows = []
    for run, kinds in losses.items():
        for kind, values in kinds.items():
            cells = [statistics.mean(values.values()), *[values[lang] for lang in languages]]
            rows.append([run, kind, *[f"{cell:.3f}" for cell in cells]])
    title = f"Loss (nats a token) with true and with shuffled encoder inputs: {title}"
    return _table(["run", "encoder input", "mean", *languages], rows, 2, title)


def _run_table(runs: dict[str, dict]) -> str:
    rows = []
    for run, done in runs.items():
        training = sum(value for name, value in done["seconds"].items() if name != "evaluation")
        steps = " + ".join(str(count) for count in done["steps"].values())
        rows.append(
            [run, steps, f"{training:.0f}", f"{done['seconds']['evaluation']:.0f}", str(done["trained_parameters"])]
        )
    return _table(["run", "steps", "training (s)", "evaluation (s)", "trained parameters"], rows, title="Runs")
