"""The files a real run leaves: results.json, table.md, answers.jsonl and plots."""

import json

from layalign.evaluation import report
from layalign.train.checkpoints import write_json

TITLES = {"mgsm": "MGSM (real questions)", "generated": "Generated problems, held out"}


def write_results(output, results, history, asked):
    """results.json, table.md, answers.jsonl and plots/, and the tables on the terminal."""
    plots = output / "plots"
    plots.mkdir(exist_ok=True)
    lines = [
        json.dumps({"system": system} | record, ensure_ascii=False)
        for (system, _), found in asked.items()
        for record in found["records"]
    ]
    (output / "answers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tables = []
    for task, accuracy in (("mgsm", results["accuracy"]), ("generated", results["generated"]["accuracy"])):
        tables.append(report.markdown_table(accuracy, title=f"{TITLES[task]}: accuracy (%), official scorer"))
        report.print_table(accuracy, title=TITLES[task])
        report.plot_accuracy(accuracy, plots / f"accuracy_{task}.png", title=TITLES[task])
    for name, losses in results["loss"].items():
        tables.append(_loss_table(name, losses))
        print(tables[-1], flush=True)
    tables.append(f"Retrieval@1 against English (%): {figures(results['retrieval_at_1'])}\n")
    (output / "table.md").write_text("\n".join(tables), encoding="utf-8")
    report.plot_losses({"layalign": history}, plots / "losses.png")
    write_json(output / "results.json", results)
    print(f'results in {output}; ask the model with: layalign generate {output / "model"} "..."', flush=True)


def _loss_table(name, losses):
    languages = list(losses["true"])
    lines = [f"## Loss (nats a token) with true and shuffled encoder inputs, {name}", ""]
    lines += ["| encoder input | mean | " + " | ".join(languages) + " |", "| --- |" + " ---: |" * (1 + len(languages))]
    for kind, values in losses.items():
        cells = [sum(values.values()) / max(1, len(values)), *[values[lang] for lang in languages]]
        lines.append(f"| {kind} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def figures(values):
    return ", ".join(f"{lang} {value:.0f}" for lang, value in values.items())
