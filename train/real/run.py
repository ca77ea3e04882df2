"""`layalign demo --real`: multilingual-e5-small and SmolLM2-135M-Instruct, joined, trained briefly, and asked MGSM."""

import platform
import time
from importlib.metadata import version
from pathlib import Path

from transformers import AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_NAME

from layalign.answering import Answerer, LLMAnswerer
from layalign.configuration import STAGES
from layalign.evaluation.run import evaluate_problems
from layalign.evaluation.tasks import load_task
from layalign.processor import LayAlignProcessor
from layalign.train.checkpoints import write_json
from layalign.train.real import material
from layalign.train.real.bases import encoder_folder, llm_folder
from layalign.train.real.callbacks import StartAtEmbeddings, TimeBudget
from layalign.train.real.measures import losses_by_stage, retrieval_at_1
from layalign.train.real.plan import PLAN, SHARES, check_arguments, plan_steps, read_plan
from layalign.train.real.problems import evaluation_problems
from layalign.train.real.results import figures, write_results
from layalign.train.recipe import DataSource, Recipe, StageRecipe
from layalign.train.stages import train

BATCH_SIZE = 8
SOURCE_TOKENS, TARGET_TOKENS = 64, 64
LEARNING_RATE = 2e-3
ANSWER_TOKENS = 128
RETRIEVAL_QUESTIONS = 50
MGSM_LOSSES, GENERATED_LOSSES = 5, 8


def run_real(output="runs/real", minutes=None, steps=None, limit=4, data=None, cache=None, seed=0):
    """Fetch and convert the two bases, train both stages, evaluate on MGSM, and write everything to `output`.

    Args:
        output: folder for model/, results.json, table.md, answers.jsonl and plots/. The same call resumes an
            interrupted one; other arguments need another folder.
        minutes: training budget in wall time, over both stages; steps: the same in optimizer steps. One of them; 10
            minutes where neither is given.
        limit: MGSM questions a language that are answered; 1 or more.
        data: folder with mgsm/mgsm_XX.tsv and, as it may be, pairs/XXX-eng.txt; None: the `datasets` library's MGSM.
        cache: folder for the converted bases; see `layalign.kernels.cache`.
        seed: of the trained part, the data's order and the generated problems.

    Returns:
        What results.json holds.

    Raises:
        ValueError: a wrong argument, missing data, a package that cannot be fetched, another run's output folder.
    """
    clock = Clock()
    output = Path(output)
    arguments = check_arguments(minutes, steps, limit, data, seed)
    plan = read_plan(output, arguments)
    questions = load_questions(data)
    data = None if data is None else Path(data)
    translation, task = material.translation_records(seed, data), material.task_records(seed)
    encoder, llm = str(encoder_folder(cache)), str(llm_folder(cache))
    clock.lap("bases and data")

    def recipe(planned):
        records = {"translation": translation, "task": task}
        return make_recipe(encoder, llm, output, {name: (records[name], planned[name]) for name in STAGES}, seed)

    if plan is None:
        plan = {"arguments": arguments, "steps": plan_steps(arguments, lambda: recipe(dict.fromkeys(STAGES, 1)), task)}
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / PLAN, plan)
        clock.lap("step timing")
    print(f"training: {plan['steps']['translation']} translation and {plan['steps']['task']} task steps", flush=True)
    model, processor, history = train(recipe(plan["steps"]), callbacks(arguments, encoder, llm, translation))
    clock.lap("training")

    first = [problem for problem in questions if problem["index"] < RETRIEVAL_QUESTIONS]
    retrieval = retrieval_at_1(model.encoder, processor.encoder_tokenizer, by_language(first))
    print("retrieval@1 against English:", figures(retrieval), flush=True)
    clock.lap("retrieval")
    held_out = evaluation_problems(GENERATED_LOSSES, seed)
    translation_weights = output / "translation" / "final" / SAFE_WEIGHTS_NAME
    losses = losses_by_stage(model, processor, translation_weights, loss_pairs(questions, held_out))
    clock.lap("losses")
    mgsm = [problem for problem in questions if problem["index"] < limit]
    asked = ask(model, processor, llm, {"mgsm": mgsm, "generated": evaluation_problems(limit, seed)})
    clock.lap("answers")
    results = {
        **accuracies(asked, "mgsm"),
        "generated": accuracies(asked, "generated"),
        "retrieval_at_1": retrieval,
        "loss": losses,
        "questions_per_language": limit,
        "steps": {name: history[name][-1]["step"] for name in STAGES},
        "planned_steps": plan["steps"],
        "records": {
            "translation": {"generated": material.GENERATED, "real": len(translation) - material.GENERATED},
            "task": {"generated": len(task), "real": 0},
        },
        "trained_parameters": model.num_trained_parameters,
        "seconds": clock.seconds,
        "seed": seed,
        "versions": {name: version(name) for name in ("layalign", "torch", "transformers")}
        | {"python": platform.python_version()},
    }
    write_results(output, results, history, asked)
    return results


class Clock:
    """Seconds by phase; `lap` ends one."""

    def __init__(self):
        self.started = self.last = time.monotonic()
        self.seconds = {}

    def lap(self, name):
        now = time.monotonic()
        self.seconds |= {name: round(now - self.last, 1), "total": round(now - self.started, 1)}
        self.last = now


def load_questions(data):
    """All MGSM problems. Raises ValueError that says how to get them."""
    try:
        questions = load_task("mgsm", data)
        if not any(problem["lang"] == "en" for problem in questions):
            raise ValueError("MGSM without its English file, which the others are compared with")
    except ValueError as error:
        files = "mgsm/mgsm_en.tsv, mgsm/mgsm_sw.tsv, ..."
        raise ValueError(f"{error}. --data takes a folder that holds {files} as published") from error
    return questions


def make_recipe(encoder, llm, output, stages, seed):
    """The two-stage recipe; stages: {name: (records, steps)}. The LLM reads the question through the encoder alone."""

    def stage(records, steps):
        return StageRecipe(
            data=DataSource(records=records),
            steps=steps,
            batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            betas=[0.9, 0.999],
            source_max_length=SOURCE_TOKENS,
            target_max_length=TARGET_TOKENS,
            save_steps=50,
            log_steps=5,
        )

    return Recipe(
        encoder=encoder,
        llm=llm,
        output=str(output),
        stages={name: stage(*given) for name, given in stages.items()},
        llm_input=dict.fromkeys(STAGES, False),
        seed=seed,
    )


def callbacks(arguments, encoder, llm, records):
    """What the trainer is given: the adapter's start, and the clock where the budget is one of time."""
    sample = [row["source"] for row in records[: 4 * BATCH_SIZE]]
    batch = LayAlignProcessor.from_bases(encoder, llm)(sample, prompt=None, encoder_max_length=SOURCE_TOKENS)
    found = [StartAtEmbeddings("translation", batch)]
    if arguments["minutes"] is not None:
        found.append(TimeBudget({name: 60 * arguments["minutes"] * share for name, share in SHARES.items()}))
    return found


def ask(model, processor, llm, problems):
    """{(system, task): result of evaluate_problems} of LayAlign and of the LLM alone, asked in its chat form."""
    alone = AutoModelForCausalLM.from_pretrained(llm).to(model.device).eval()
    chat = [{"role": "user", "content": "{text}"}]
    template = processor.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    limits = {"max_new_tokens": ANSWER_TOKENS, "batch_size": 16}
    systems = {
        "llm": LLMAnswerer(alone, processor.tokenizer, template, **limits),
        "layalign": Answerer(model, processor, **limits),
    }
    asked = {}
    for task, chosen in problems.items():
        for system, answer in systems.items():
            print(f"{task}: {len(chosen)} questions for {system}", flush=True)
            asked[system, task] = evaluate_problems(answer, chosen)
    return asked


def loss_pairs(questions, held_out):
    """{stage: {name: {lang: [(text for the encoder, target)]}}}: MGSM and generated problems, for `losses_by_stage`."""
    english = {problem["index"]: problem["question"] for problem in questions if problem["lang"] == "en"}
    shared = [problem for problem in questions if problem["index"] < MGSM_LOSSES and problem["index"] in english]
    mgsm = by_language(shared, lambda problem: (problem["question"], english[problem["index"]]))
    generated = by_language(held_out, lambda problem: (problem["question"], problem["text"]))
    answers = by_language(held_out, lambda problem: (problem["question"], problem["worked_answer"]))
    return {"translation": {"mgsm": mgsm, "generated": generated}, "task": {"generated": answers}}


def by_language(problems, value=lambda problem: problem["question"]):
    """{lang: [value of each problem]}."""
    grouped = {}
    for problem in problems:
        grouped.setdefault(problem["lang"], []).append(value(problem))
    return grouped


def accuracies(asked, task):
    """{"accuracy": {system: {lang: per cent}}, "strict": the same by the strict scorer} of one task."""
    found = {system: result["accuracy"] for (system, name), result in asked.items() if name == task}
    return {
        key: {system: scores[scorer] for system, scores in found.items()}
        for key, scorer in (("accuracy", "official"), ("strict", "strict"))
    }
