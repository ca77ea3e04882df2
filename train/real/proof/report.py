"""results.json, table.md and plots of the runs that are finished."""

import json
import platform
import statistics
from importlib.metadata import version

from layalign.analysis.plots import plot_components, plot_english
from layalign.analysis.run import english_tables
from layalign.evaluation import report
from layalign.kernels.files import write_json
from layalign.train.real.proof.systems import LLM_ALONE, SYSTEMS, TITLES

TASKS = {
    "held_out": "Held-out problems: unseen combinations of patterns, unseen pairs of numbers",
    "new_wording": "Held-out problems: patterns never seen in training, unseen pairs of numbers",
    "msvamp": "MSVAMP, first questions",
    "mgsm": "MGSM, first questions",
}
LOSSES = {
    "loss_held_out": "answers to held-out problems",
    "loss_new_wording": "answers to problems of new wording",
    "loss_tatoeba": "LASER's Tatoeba, after the translation stage",
}


def write_report(output, plan, data_report):
    """Write the files of all finished runs and of the LLM alone in `output`; return what results.json holds.

    results.json: accuracy {task: {run: {lang: per cent}}} by the strict scorer; systems {task: {system: {"seeds",
    "languages": {lang: {"mean", "min", "max"}}, "mean", "spread"}}} where mean is over the languages but English and
    spread the sample standard deviation of that mean over seeds (None for one seed); understood {task: {run: {lang: per
    cent of answers whose sum is the right one, whatever the result}}}; english {run: `against_english` of the LLM's last
    layer, held-out problems}; loss, chrf, runs, data, versions.
    """
    runs = _finished(output)
    accuracy = {task: _accuracies(output, runs, task) for task in TASKS}
    accuracy = {task: found for task, found in accuracy.items() if found}
    analyses = _read_all(output, [LLM_ALONE, *runs], "analysis")
    results = {
        "accuracy": accuracy,
        "systems": {task: _by_system(found) for task, found in accuracy.items()},
        "understood": {task: _understood(output, runs, task) for task in ("held_out", "new_wording")},
        "english": {run: found["english"]["llm"] for run, found in analyses.items()},
        "loss": {name: _read_all(output, runs, name) for name in LOSSES},
        "chrf": {run: found["chrf"] for run, found in _read_all(output, runs, "chrf_tatoeba").items()},
        "runs": {run: {key: value for key, value in done.items() if key != "history"} for run, done in runs.items()},
        "steps": plan["steps"],
        "arguments": {key: value for key, value in plan["arguments"].items() if key != "data"},
        "data": data_report,
        "versions": {name: version(name) for name in ("layalign", "torch", "transformers")}
        | {"python": platform.python_version()},
    }
    (output / "table.md").write_text(_tables(results), encoding="utf-8")
    plots = output / "plots"
    for task, systems in results["systems"].items():
        report.plot_accuracy(_means(systems), plots / f"accuracy_{task}.png", TASKS[task])
    if runs:
        report.plot_losses({run: done["history"] for run, done in runs.items()}, plots / "loss.png", "Training loss")
    if analyses:
        plot_english(_english_by_system(results["english"]), plots / "english.png")
        best = best_run(results, "layalign")
        shown = {"LLM alone": LLM_ALONE, f"LayAlign ({best})": best}
        shown = {title: analyses[run]["components"]["llm"] for title, run in shown.items() if run in analyses}
        if shown:
            plot_components(shown, plots / "components.png")
    gates = {run: done["gates"] for run, done in runs.items() if done["gates"] is not None}
    if gates:
        report.plot_gates(gates, plots / "gates.png", "Gates after training")
    write_json(output / "results.json", results)
    return results


def _finished(output):
    """{run: its done.json}, in the order of the systems and seeds."""
    order = list(SYSTEMS)
    files = sorted(
        output.glob("*-*/done.json"),
        key=lambda file: (order.index(system_of(file.parent.name)), int(file.parent.name.rpartition("-")[2])),
    )
    return {file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in files}


def system_of(run):
    return run.rpartition("-")[0] if "-" in run else run


def _read_all(output, runs, piece):
    files = {run: output / run / "evaluation" / f"{piece}.json" for run in runs}
    return {run: json.loads(file.read_text(encoding="utf-8")) for run, file in files.items() if file.exists()}


def _accuracies(output, runs, task):
    found = _read_all(output, [LLM_ALONE, *runs], task)
    return {run: result["accuracy"]["strict"] for run, result in found.items()}


def _understood(output, runs, task):
    found = {}
    for run, result in _read_all(output, [LLM_ALONE, *runs], task).items():
        verdicts = {}
        for record in result["records"]:
            right = record["prediction"].split("=")[0].split() == record["worked_answer"].split("=")[0].split()
            verdicts.setdefault(record["lang"], []).append(right)
        found[run] = {lang: 100 * statistics.mean(rows) for lang, rows in verdicts.items()}
    return found


def _by_system(accuracy):
    grouped = {}
    for run, scores in accuracy.items():
        grouped.setdefault(system_of(run), []).append(scores)
    found = {}
    for system, rows in grouped.items():
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


def best_run(results, system):
    """The run of `system` with the best held-out accuracy, the mean of the languages but English; None where none is finished."""
    accuracy = results["accuracy"].get("held_out", {})
    runs = [run for run in accuracy if run.rpartition("-")[0] == system]
    means = {run: _mean_but_english(accuracy[run]) for run in runs}
    return max(means, key=means.get, default=None)


def _mean_but_english(scores):
    return statistics.mean(score for lang, score in scores.items() if lang != "en")


def _english_by_system(english):
    """{title: {lang: {kind: mean over the system's runs}}} for the plot."""
    grouped = {}
    for run, found in english.items():
        # Here the LLM alone is shown no examples.
        title = "LLM alone" if run == LLM_ALONE else TITLES[system_of(run)]
        grouped.setdefault(title, []).append(found)
    return {
        title: {
            lang: {kind: statistics.mean(run[lang][kind] for run in runs) for kind in kinds}
            for lang, kinds in runs[0].items()
        }
        for title, runs in grouped.items()
    }


def _means(systems):
    """{title: {lang: mean per cent}} for the tables and plots of the evaluation."""
    return {
        TITLES[system] + (f", {found['seeds']} seeds" if found["seeds"] > 1 else ""): {
            lang: values["mean"] for lang, values in found["languages"].items()
        }
        for system, found in systems.items()
    }


def _tables(results):
    tables = []
    for task, systems in results["systems"].items():
        tables.append(report.markdown_table(_means(systems), title=f"{TASKS[task]}: accuracy (%), strict scorer"))
        lines = [
            "| system | mean but English | seeds' deviation | gain over the LLM, least language |",
            "| --- |" + " ---: |" * 3,
        ]
        alone = systems.get(LLM_ALONE)
        for system, found in systems.items():
            spread = "-" if found["spread"] is None else f"{found['spread']:.1f}"
            least = "-" if alone is None else _least_gain(found, alone)
            lines.append(f"| {TITLES[system]} | {found['mean']:.1f} | {spread} | {least} |")
        tables.append("\n".join(lines) + "\n")
    for task, found in results["understood"].items():
        if found:
            tables.append(report.markdown_table(found, title=f"{TASKS[task]}: the right sum (%), whatever its result"))
    if results["english"]:
        for title, table in english_tables(results["english"]).items():
            tables.append(report.markdown_table(table, f"Held-out problems, LLM's last layer, mean-pooled. {title}"))
    for name, losses in results["loss"].items():
        # A language with a single different answer has no loss.
        if losses := {run: kinds for run, kinds in losses.items() if kinds["true"]}:
            tables.append(_loss_table(LOSSES[name], losses))
    if chrf := {run: scores for run, scores in results["chrf"].items() if scores}:
        tables.append(
            report.markdown_table(chrf, title="LASER's Tatoeba into English: chrF, after the translation stage")
        )
    lines = [
        "## Runs",
        "",
        "| run | steps | training (s) | evaluation (s) | trained parameters |",
        "| --- |" + " ---: |" * 4,
    ]
    for run, done in results["runs"].items():
        seconds = dict(done["seconds"])
        evaluation = seconds.pop("evaluation")
        steps = " + ".join(str(count) for count in done["steps"].values())
        lines.append(
            f"| {run} | {steps} | {sum(seconds.values()):.0f} | {evaluation:.0f} | {done['trained_parameters']} |"
        )
    return "\n".join([*tables, "\n".join(lines) + "\n"])


def _least_gain(found, alone):
    gains = {
        lang: values["mean"] - alone["languages"][lang]["mean"]
        for lang, values in found["languages"].items()
        if lang != "en"
    }
    lang = min(gains, key=gains.get)
    return f"{gains[lang]:+.1f} ({lang})"


def _loss_table(title, losses):
    languages = list(next(iter(losses.values()))["true"])
    lines = [f"## Loss (nats a token) with true and with shuffled encoder inputs: {title}", ""]
    lines += ["| run | encoder input | mean | " + " | ".join(languages) + " |"]
    lines += ["| --- | --- |" + " ---: |" * (1 + len(languages))]
    for run, kinds in losses.items():
        for kind, values in kinds.items():
            cells = [statistics.mean(values.values()), *[values[lang] for lang in languages]]
            lines.append(f"| {run} | {kind} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines) + "\n"
