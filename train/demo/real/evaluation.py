"""What is measured of a trained run and of the LLM alone; every piece is a JSON file, made once."""

from __future__ import annotations

import itertools
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME

from layalign.analysis.run import measured, measured_alone
from layalign.analysis.texts import parallel_questions
from layalign.arguments import NO_CODE
from layalign.evaluation.loop import evaluate_problems
from layalign.generation.texts import Answerer, LLMAnswerer
from layalign.model import LayAlignForConditionalGeneration
from layalign.processor import LayAlignProcessor
from layalign.saving import load_trained_part
from layalign.tasks import load_task
from layalign.train.demo.driver import made
from layalign.train.demo.problems import NEW_WORDING, REAL, TWO_STEPS, ProblemSource
from layalign.train.demo.real.tatoeba import laser_pairs

ANSWER_TOKENS, TRANSLATION_TOKENS = 24, 48
BATCH_SIZE = 25
SHOTS = 4
ASKED = ("held_out", "new_wording", "hundred", "two_steps", "msvamp", "msvamp_one", "mgsm")
# The LLM alone is shown problems of one step up to 20, but where two are asked for.
SHOWN: dict[str, ProblemSource] = {"two_steps": TWO_STEPS}
LONGER = {"two_steps": 48, "msvamp_one": 48}  # tokens of an answer
SOURCE_TOKENS = 64
LOSS_PAIRS = 20

Pairs = list[tuple[str, str]]
EvaluationSets = dict[str, Any]


def evaluation_sets(
    questions: int, benchmark_questions: int, sentences: int, data: Path | None = None, seed: int = 0
) -> EvaluationSets:
    """What is asked: {"held_out", "new_wording", "msvamp", "mgsm": list of problems, "tatoeba": {lang: pairs}}.

    Args:
        questions, benchmark_questions, sentences: how many a language; of new wordings half as many as `questions`, at
            least 2.
        data: folder with msvamp/, mgsm/ and tatoeba_laser/; what is not there is left out.
        seed: of the generated problems.
    """
    found: EvaluationSets = {
        "held_out": REAL.evaluation_problems(questions, seed),
        "new_wording": REAL.evaluation_problems(max(2, questions // 2), seed, NEW_WORDING),
    }
    for task in ("msvamp", "mgsm"):
        if data is not None and (data / task).is_dir():
            found[task] = load_task(task, data, limit=benchmark_questions)
    if data is not None and (pairs := laser_pairs(data / "tatoeba_laser", sentences)):
        found["tatoeba"] = pairs
    return found


def evaluate_trained(
    model: LayAlignForConditionalGeneration, processor: LayAlignProcessor, folder: Path, sets: EvaluationSets
) -> dict[str, Any]:
    """Every piece of a run's evaluation, {piece: result}; those already in folder/evaluation are read, not made again.

    The task stage's model answers; the translation stage's, where there was one, translates and is measured on LASER's
    Tatoeba with its own and with its neighbour's encoder input.
    """
    results = evaluate_answers(model, processor, folder, sets)
    translated = folder / "translation" / "final" / SAFE_WEIGHTS_NAME
    if "tatoeba" not in sets or not translated.is_file():
        return results
    trained = {name: value.clone() for name, value in model.trained_state_dict().items()}
    load_trained_part(model, load_file(translated), str(translated))
    results |= evaluate_translation(model, processor, folder, sets["tatoeba"])
    load_trained_part(model, trained, "the trained model")
    return results


def evaluate_answers(
    model: LayAlignForConditionalGeneration, processor: LayAlignProcessor, folder: Path, sets: EvaluationSets
) -> dict[str, Any]:
    """The pieces that ask the model."""

    def answers(name: str) -> dict[str, Any]:
        tokens = LONGER.get(name, ANSWER_TOKENS)
        answer = Answerer(model, processor, max_new_tokens=tokens, batch_size=BATCH_SIZE)
        return evaluate_problems(answer, sets[name], 2 * BATCH_SIZE)

    pieces: dict[str, Any] = {name: partial(answers, name) for name in ASKED if name in sets}
    for name in ("held_out", "new_wording"):
        pieces[f"loss_{name}"] = partial(_losses, model, processor, _answer_pairs(sets[name]))
    questions = parallel_questions(sets["held_out"])
    pieces["analysis"] = partial(measured, model, processor, questions, batch_size=BATCH_SIZE, prompt=None)
    return made(folder, pieces)


def evaluate_translation(
    model: LayAlignForConditionalGeneration,
    processor: LayAlignProcessor,
    folder: Path,
    pairs: dict[str, Pairs],
    after: str = "",
) -> dict[str, Any]:
    """The pieces that have the model translate; after: "_task" where it has been through that stage."""
    pieces = {
        f"loss_tatoeba{after}": partial(_losses, model, processor, pairs),
        f"chrf_tatoeba{after}": partial(_chrf, model, processor, pairs),
    }
    return made(folder, pieces)


def evaluate_llm(llm: str, folder: Path, sets: EvaluationSets, seed: int = 0) -> dict[str, Any]:
    """The same pieces for the LLM alone, where it has them.

    It is shown four training problems in the question's language, English ones where there are none, and its answer ends
    with the line. llm: its folder.
    """

    @cache
    def loaded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model = AutoModelForCausalLM.from_pretrained(llm, **NO_CODE)
        return model.eval(), AutoTokenizer.from_pretrained(llm, **NO_CODE)

    def answers(name: str) -> dict[str, Any]:
        shown, tokens = SHOWN.get(name, REAL), LONGER.get(name, ANSWER_TOKENS)
        return _few_shot(*loaded(), sets[name], seed, shown, tokens)

    def analysis() -> dict[str, Any]:
        return measured_alone(*loaded(), parallel_questions(sets["held_out"]), batch_size=BATCH_SIZE)

    pieces = {name: partial(answers, name) for name in ASKED if name in sets}
    return made(folder, pieces | {"analysis": partial(analysis)})


def few_shot_template(language: str, seed: int = 0, source: ProblemSource = REAL) -> str:
    """Four training problems with their equations, and room for the question as {text}.

    Sums stand as they are: shown eight that are worked place by place, the LLM has 2 % of bare sums up to 100 right, else 13 %.
    """
    shown = itertools.islice(source.problems(f"shots {seed}"), SHOTS)
    shots = [f"Question: {problem.text(language)}\nAnswer: {', '.join(problem.equations)}\n\n" for problem in shown]
    return "".join(shots) + "Question: {text}\nAnswer:"


def _few_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[dict],
    seed: int,
    shown: ProblemSource,
    answer_tokens: int,
) -> dict[str, Any]:
    found: dict[str, Any] = {"accuracy": {"official": {}, "strict": {}}, "records": []}
    # After its line the LLM would make up questions of its own, twice as long as the answer.
    line_end = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for language in dict.fromkeys(problem["lang"] for problem in problems):
        template = few_shot_template(language if language in shown.languages else "en", seed, shown)
        answerer = LLMAnswerer(
            model, tokenizer, template, max_new_tokens=answer_tokens, batch_size=BATCH_SIZE, eos_token_id=line_end
        )
        chosen = [problem for problem in problems if problem["lang"] == language]
        part = evaluate_problems(answerer, chosen, 2 * BATCH_SIZE)
        found["records"] += part["records"]
        for scorer, accuracy in part["accuracy"].items():
            found["accuracy"][scorer] |= accuracy
    return found


def _answer_pairs(problems: list[dict]) -> dict[str, Pairs]:
    """{lang: [(question, worked answer)]}, the first 20; each worked answer once, so that no neighbour has the same."""
    pairs: dict[str, dict[str, str]] = {}
    for problem in problems:
        pairs.setdefault(problem["lang"], {}).setdefault(problem["worked_answer"], problem["question"])
    return {
        lang: [(question, answer) for answer, question in found.items()][:LOSS_PAIRS] for lang, found in pairs.items()
    }


def loss_against_shuffled(
    model: LayAlignForConditionalGeneration,
    processor: LayAlignProcessor,
    pairs: Pairs,
    batch_size: int = 8,
    source_max_length: int = 128,
) -> tuple[float, float]:
    """Mean loss of the target tokens with each row's own encoder input, and with its neighbour's.

    Whether meaning crosses, or style alone.

    Args:
        model, processor: a trained run's.
        pairs: (text for the encoder, target text), at least 2, targets different.
        batch_size: pairs at a time.
        source_max_length: tokens of the encoder, to which a text is cut.

    Returns:
        (true, shuffled), in nats a token.
    """
    losses, tokens = [0.0, 0.0], 0
    parts = max(1, len(pairs) // batch_size)
    with torch.inference_mode():
        for part in (pairs[place::parts] for place in range(parts)):
            sources, targets = [source for source, _ in part], [target for _, target in part]
            batch = processor(sources, prompt=None, target=targets, encoder_max_length=source_max_length)
            batch = batch.to(model.device)
            count = int((batch["labels"] != -100).sum())
            tokens += count
            losses[0] += model(**batch).loss.item() * count
            for name in ("encoder_input_ids", "encoder_attention_mask"):
                batch[name] = batch[name].roll(1, 0)
            losses[1] += model(**batch).loss.item() * count
    return losses[0] / tokens, losses[1] / tokens


def _losses(
    model: LayAlignForConditionalGeneration, processor: LayAlignProcessor, pairs: dict[str, Pairs]
) -> dict[str, dict[str, float]]:
    found = {
        lang: loss_against_shuffled(model, processor, rows, source_max_length=SOURCE_TOKENS)
        for lang, rows in pairs.items()
        if len(rows) > 1
    }
    return {
        name: {lang: losses[place] for lang, losses in found.items()} for place, name in enumerate(("true", "shuffled"))
    }


def _chrf(
    model: LayAlignForConditionalGeneration, processor: LayAlignProcessor, pairs: dict[str, Pairs]
) -> dict[str, Any]:
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
