"""Trains and evaluates the systems one after another, and goes on where it was stopped."""

import time
from pathlib import Path

import torch

from layalign.kernels.files import write_json
from layalign.train.real.bases import encoder_folder, llm_folder
from layalign.train.real.problems import task_records
from layalign.train.real.proof.data import REAL_SHARE, prepare
from layalign.train.real.proof.evaluation import evaluate_llm, evaluate_trained, evaluation_sets
from layalign.train.real.proof.plan import PLAN, SHARES, budget, check_count, plan_steps, read_plan
from layalign.train.real.proof.report import write_report
from layalign.train.real.proof.systems import DEFAULT, LLM_ALONE, SYSTEMS, runs_of
from layalign.train.real.proof.training import make_recipe, train_run, training_seconds

DONE = "done.json"
TIMED_RECORDS = 128


def run_proof(
    output="runs/proof",
    data=None,
    systems=DEFAULT,
    seeds=(0, 1, 2),
    *,
    steps=None,
    minutes=None,
    precision=None,
    questions=50,
    benchmark_questions=5,
    sentences=16,
    real_share=REAL_SHARE,
    cache=None,
):
    """Train and evaluate every system and the LLM alone; write results.json, table.md and plots/ after each.

    The same call goes on where an earlier one stopped, in the middle of a stage too, and leaves alone what is finished;
    more systems and seeds may be added later, or by another process meanwhile: two of one thread each take 2.15 s a step
    on two cores, one of two threads takes 1.4.

    Args:
        output: folder of the proof; each run has a folder `SYSTEM-SEED` there.
        data: folder with tatoeba_pairs/, tatoeba_laser/, mgsm/, msvamp/ and gsm8k/, those there are; None: generated
            text alone.
        systems, seeds: names of `SYSTEMS` and "llm", the LLM alone, which is asked first; seeds of the trained part and
            the data order; see `runs_of`.
        steps: optimizer steps of each run over both stages, 2 or more; or minutes: of a LayAlign run, from which the
            steps are found once by timing; 40 minutes where neither is given.
        precision: "fp32" or "bf16" in training, None for the recipe's own; whatever is answered is fp32.
        questions, benchmark_questions, sentences: a language: generated problems, MSVAMP and MGSM questions, and LASER
            sentences that are translated.
        real_share: share of real sentence pairs in the translation stage's records, where there are so many.
        cache: folder of the converted bases.

    Returns:
        What results.json holds.

    Raises:
        ValueError: a wrong argument, a folder of another proof, data that cannot be read, a package that cannot be had.
    """
    output, data = Path(output), None if data is None else Path(data)
    counts = {"questions": questions, "benchmark_questions": benchmark_questions, "sentences": sentences}
    arguments = _checked(data, steps, minutes, precision, real_share, counts)
    runs = runs_of(list(systems), list(seeds))
    plan = read_plan(output, arguments)
    sets = evaluation_sets(questions, benchmark_questions, sentences, data)
    bases = str(encoder_folder(cache)), str(llm_folder(cache))
    if plan is None:
        plan = {"arguments": arguments, "steps": _planned(arguments, bases)}
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / PLAN, plan)
    batch_size = (
        make_recipe(SYSTEMS["layalign"], 0, plan["steps"], bases, output, output / "data").stages["task"].batch_size
    )
    # A run with one stage spends all its steps on that one.
    total = sum(plan["steps"].values())
    translating = any(system.stages == ("translation",) for system, _ in runs)
    records = {"translation": total if translating else plan["steps"]["translation"], "task": total}
    records = {stage: count * batch_size for stage, count in records.items()}
    report = prepare(output / "data", records, data, real_share)
    if LLM_ALONE in systems:
        evaluate_llm(bases[1], output / LLM_ALONE, sets)
    results = write_report(output, plan, report)
    for system, seed in runs:
        folder = output / f"{system.name}-{seed}"
        if not (folder / DONE).exists():
            recipe = make_recipe(system, seed, plan["steps"], bases, folder, output / "data", precision)
            _make(recipe, folder, sets)
            results = write_report(output, plan, report)
    print(f"results in {output}; each run's model is in RUN/model, for `layalign generate`", flush=True)
    return results


def _make(recipe, folder, sets):
    print(f"{folder.name}: {sum(stage.steps for stage in recipe.stages.values())} steps", flush=True)
    model, processor, history = train_run(recipe)
    started = time.monotonic()
    evaluate_trained(model, processor, folder, sets)
    first = next(iter(recipe.stages.values()))
    done = {
        "steps": {name: stage.steps for name, stage in recipe.stages.items()},
        "batch_size": first.batch_size,
        "precision": first.precision,
        "seconds": training_seconds(folder) | {"evaluation": round(time.monotonic() - started, 1)},
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "trained_parameters": model.num_trained_parameters,
        "gates": None if model.aligner is None else model.gates().tolist(),
        "history": history,
    }
    write_json(folder / DONE, done)


def _planned(arguments, bases):
    def recipe():
        return make_recipe(SYSTEMS["layalign"], 0, dict.fromkeys(SHARES, 1), bases, ".", ".", arguments["precision"])

    return plan_steps(arguments, recipe, task_records(TIMED_RECORDS, "timing"))


def _checked(data, steps, minutes, precision, real_share, counts):
    for name, value in counts.items():
        check_count(name, value, 2)
    if precision not in (None, "fp32", "bf16"):
        raise ValueError(f"precision: got {precision!r}, takes 'fp32' or 'bf16'")
    if not 0 <= real_share <= 1:
        raise ValueError(f"real_share: got {real_share}, takes a number from 0 to 1")
    if data is not None and not data.is_dir():
        raise ValueError(f"data: {data} is not a folder")
    place = None if data is None else str(data.resolve())
    return budget(minutes, steps) | {"precision": precision, "data": place, "real_share": real_share} | counts
