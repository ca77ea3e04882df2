"""What is measured of a trained run and of the LLM alone; every piece is a JSON file, made once."""

import itertools
import json
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_NAME

from layalign.analysis.run import measured, measured_alone
from layalign.analysis.texts import parallel_questions
from layalign.evaluation.run import evaluate_problems
from layalign.generation.texts import Answerer, LLMAnswerer
from layalign.kernels.files import write_json
from layalign.saving import load_trained_part
from layalign.tasks import load_task
from layalign.train.real.problems import LANGUAGES, evaluation_problems, mixed_problems
from layalign.train.real.proof.measures import loss_against_shuffled
from layalign.train.real.tatoeba import laser_pairs

ANSWER_TOKENS, TRANSLATION_TOKENS = 16, 48
BATCH_SIZE = 25
SHOTS = 4
ASKED = ("held_out", "new_wording", "msvamp", "mgsm")
SOURCE_TOKENS = 64
LOSS_PAIRS = 20


def evaluation_sets(questions, benchmark_questions, sentences, data=None, seed=0):
    """What is asked: {"held_out", "new_wording", "msvamp", "mgsm": list of problems, "tatoeba": {lang: pairs}}.

    questions, benchmark_questions, sentences: how many a language; of new wordings half as many as `questions`, at least 2. data:
    folder with msvamp/, mgsm/ and tatoeba_laser/, pathlib.Path or None; what is not there is left out.
    """
    found = {
        "held_out": evaluation_problems(questions, seed),
        "new_wording": evaluation_problems(max(2, questions // 2), seed, "new_wording"),
    }
    for task in ("msvamp", "mgsm"):
        if data is not None and (data / task).is_dir():
            found[task] = load_task(task, data, limit=benchmark_questions)
    if data is not None and (pairs := laser_pairs(data / "tatoeba_laser", sentences)):
        found["tatoeba"] = pairs
    return found


def evaluate_trained(model, processor, folder, sets):
    """Every piece of a run's evaluation, {piece: result}; those already in folder/evaluation are read, not made again.

    The task stage's model answers; the translation stage's, where there was one, translates and is measured on LASER's
    Tatoeba with its own and with its neighbour's encoder input.
    """
    answer = Answerer(model, processor, max_new_tokens=ANSWER_TOKENS, batch_size=BATCH_SIZE)
    pieces = {name: partial(evaluate_problems, answer, sets[name], 2 * BATCH_SIZE) for name in ASKED if name in sets}
    for name in ("held_out", "new_wording"):
        pieces[f"loss_{name}"] = partial(_losses, model, processor, _answer_pairs(sets[name]))
    questions = parallel_questions(sets["held_out"])
    pieces["analysis"] = partial(measured, model, processor, questions, batch_size=BATCH_SIZE, prompt=None)
    results = _made(folder, pieces)
    translated = Path(folder) / "translation" / "final" / SAFE_WEIGHTS_NAME
    if "tatoeba" not in sets or not translated.is_file():
        return results
    after = {
        "loss_tatoeba": partial(_losses, model, processor, sets["tatoeba"]),
        "chrf_tatoeba": partial(_chrf, model, processor, sets["tatoeba"]),
    }
    trained = {name: value.clone() for name, value in model.trained_state_dict().items()}
    load_trained_part(model, load_file(translated), str(translated))
    results |= _made(folder, after)
    load_trained_part(model, trained, "the trained model")
    return results


def evaluate_llm(llm, folder, sets, seed=0):
    """The same pieces for the LLM alone, where it has them: it is shown four training problems in the question's language,
    English ones where there are none, and its answer ends with the line. llm: its folder."""

    @cache
    def loaded():
        return AutoModelForCausalLM.from_pretrained(llm).eval(), AutoTokenizer.from_pretrained(llm)

    pieces = {name: lambda problems=sets[name]: _few_shot(*loaded(), problems, seed) for name in ASKED if name in sets}
    questions = parallel_questions(sets["held_out"])
    pieces["analysis"] = lambda: measured_alone(*loaded(), questions, batch_size=BATCH_SIZE)
    return _made(folder, pieces)


def few_shot_template(language, seed=0):
    """Four training problems with their worked answers, and room for the question as {text}."""
    shown = itertools.islice(mixed_problems(f"shots {seed}"), SHOTS)
    shots = [f"Question: {problem.text(language)}\nAnswer: {problem.worked_answer}\n\n" for problem in shown]
    return "".join(shots) + "Question: {text}\nAnswer:"


def _few_shot(model, tokenizer, problems, seed):
    found = {"accuracy": {"official": {}, "strict": {}}, "records": []}
    # After its line the LLM would make up questions of its own, twice as long as the answer.
    line_end = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for language in dict.fromkeys(problem["lang"] for problem in problems):
        template = few_shot_template(language if language in LANGUAGES else "en", seed)
        answerer = LLMAnswerer(
            model, tokenizer, template, max_new_tokens=ANSWER_TOKENS, batch_size=BATCH_SIZE, eos_token_id=line_end
        )
        chosen = [problem for problem in problems if problem["lang"] == language]
        part = evaluate_problems(answerer, chosen, 2 * BATCH_SIZE)
        found["records"] += part["records"]
        for scorer, accuracy in part["accuracy"].items():
            found["accuracy"][scorer] |= accuracy
    return found


def _answer_pairs(problems):
    """{lang: [(question, worked answer)]}, the first 20; each worked answer once, so that no neighbour has the same."""
    pairs = {}
    for problem in problems:
        pairs.setdefault(problem["lang"], {}).setdefault(problem["worked_answer"], problem["question"])
    return {
        lang: [(question, answer) for answer, question in found.items()][:LOSS_PAIRS] for lang, found in pairs.items()
    }


def _losses(model, processor, pairs):
    found = {
        lang: loss_against_shuffled(model, processor, rows, source_max_length=SOURCE_TOKENS)
        for lang, rows in pairs.items()
        if len(rows) > 1
    }
    return {
        name: {lang: losses[place] for lang, losses in found.items()} for place, name in enumerate(("true", "shuffled"))
    }


def _chrf(model, processor, pairs):
    """{"chrf": {lang: corpus chrF} or None without sacrebleu, "translations": {lang: [...]}}."""
    answer = Answerer(model, processor, max_new_tokens=TRANSLATION_TOKENS, batch_size=BATCH_SIZE)
    written = {lang: answer([source for source, _ in rows]) for lang, rows in pairs.items()}
    scores = None
    if find_spec("sacrebleu") is not None:
        from sacrebleu import corpus_chrf

        scores = {
            lang: corpus_chrf(texts, [[english for _, english in pairs[lang]]]).score for lang, texts in written.items()
        }
    rows = {
        lang: [[*pair, text] for pair, text in zip(pairs[lang], texts, strict=True)] for lang, texts in written.items()
    }
    return {"chrf": scores, "translations": rows}


def _made(folder, pieces):
    results = {}
    for name, make in pieces.items():
        file = _file(folder, name)
        if not file.exists():
            print(f"{Path(folder).name}: {name}", flush=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, make())
        results[name] = json.loads(file.read_text(encoding="utf-8"))
    return results


def _file(folder, name):
    return Path(folder) / "evaluation" / f"{name}.json"
