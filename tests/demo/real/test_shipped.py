"""The trained part that comes with the package, and what is written beside it."""

import json
import statistics

import pytest
from safetensors import safe_open

from layalign.evaluation.loop import evaluate_problems
from layalign.folders import damage
from layalign.generation.texts import Answerer
from layalign.train.demo.problems import REAL
from layalign.train.demo.real.export import FURTHER_REPORT, LAST_REPORT, PLOTS, REPORT, TRANSLATION, TRANSLATIONS
from layalign.train.demo.real.shipped import ANSWER_TOKENS, SHIPPED, answer_shipped, load_shipped
from layalign.train.demo.systems import LLM_ALONE
from layalign.train.initial import InitialWeights
from layalign.train.recipe import InitFrom


def test_shipped_files_are_whole_and_small():
    assert damage(SHIPPED) is None and damage(REPORT) is None and damage(LAST_REPORT) is None
    with safe_open(SHIPPED / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert any(name.startswith("aligner") for name in names) and any(name.startswith("adapter") for name in names)
    assert sum(path.stat().st_size for folder in (SHIPPED, REPORT) for path in folder.iterdir()) < 6e6
    for report in (REPORT, FURTHER_REPORT, LAST_REPORT):
        assert {path.name for path in report.iterdir()} >= {*PLOTS, "results.json", "log.jsonl", "README.md"}


def test_the_shipped_part_goes_on_from_the_second_experiments():
    """And has more right of everything; its report and its card say with what it began."""
    part = SHIPPED.with_name("task")
    assert damage(part) is None
    last, before = (
        json.loads((report / "results.json").read_text(encoding="utf-8")) for report in (LAST_REPORT, FURTHER_REPORT)
    )
    (run,) = last["runs"]
    begun = last["runs"][run]["begun_with"]
    assert begun == InitialWeights(str(part), InitFrom(path=str(part)).only).digest()[:12]
    assert f"begun with the part {begun}" in (SHIPPED / "README.md").read_text(encoding="utf-8")
    means = {
        name: [
            statistics.mean(results["accuracy"][name][of].values())
            for results, of in ((last, run), (before, "layalign-0"))
        ]
        for name in before["accuracy"]
    }
    assert all(now > then for now, then in means.values()), means
    losses = last["loss"]["loss_tatoeba_task"][run]
    assert all(losses["shuffled"][language] - losses["true"][language] > 2 for language in losses["true"])


@pytest.mark.parametrize("name", TRANSLATIONS.values())
def test_the_parts_after_the_translation_stage_are_whole(name):
    """What their cards say of each language: two nats between another's input and its own."""
    folder = SHIPPED.with_name(name)
    assert damage(folder) is None
    assert (folder / "model.safetensors").stat().st_size < 4e6
    card = (folder / "README.md").read_text(encoding="utf-8")
    header, own, other = (
        [cell.strip() for cell in line.split("|")[4:-1]]
        for line in card.splitlines()
        if line[:5] in ("| run", "| lay", "| min")
    )
    assert set(header) == {*REAL.languages, "te"} - {"en"}
    assert all(float(others) - float(owns) > 2 for owns, others in zip(own, other, strict=True))


def test_the_claim_is_what_the_results_say():
    """Points over the LLM alone on held-out problems, and nats between true and shuffled encoder inputs, of three seeds."""
    results = json.loads((REPORT / "results.json").read_text(encoding="utf-8"))
    accuracy = results["accuracy"]["held_out"]
    runs = [run for run in accuracy if run.startswith("layalign-")]
    assert len(runs) >= 3 and set(accuracy["llm"]) == set(REAL.languages)
    others = [language for language in REAL.languages if language != "en"]
    gains = [
        statistics.mean(accuracy[run][language] for run in runs) - accuracy["llm"][language] for language in others
    ]
    assert statistics.mean(gains) >= 45 and min(gains) >= 30
    for run in runs:
        losses = results["loss"]["loss_held_out"][run]
        assert all(losses["shuffled"][language] - losses["true"][language] > 0.5 for language in REAL.languages)
        # English of the same meaning is the nearest of fifty; by chance in 2 %.
        assert statistics.mean(found["found"] for found in results["english"][run].values()) > 50


def test_the_other_systems_stand_beside_it_with_the_same_budget():
    results = json.loads((REPORT / "results.json").read_text(encoding="utf-8"))
    runs = results["runs"]
    assert {"mindmerger-0", "mindmerger-1", "mindmerger-2", "langbridge-0"} <= set(runs)
    assert len({tuple(run["steps"].items()) for run in runs.values()}) == 1
    for accuracy in results["accuracy"].values():
        assert set(accuracy) == {"llm", *runs}


def test_the_second_experiment_says_of_both_systems_the_same_things():
    """After as many steps LayAlign has more right of each set; what the encoder reads counts for both."""
    assert damage(FURTHER_REPORT) is None
    results = json.loads((FURTHER_REPORT / "results.json").read_text(encoding="utf-8"))
    runs = results["runs"]
    assert {"layalign-0", "mindmerger-0"} <= set(runs)
    assert len({tuple(run["steps"].items()) for run in runs.values()}) == 1
    assert set(results["accuracy"]) == {"held_out", "new_wording", "hundred", "two_steps", "msvamp_one"}
    for name, accuracy in results["accuracy"].items():
        own, other = (
            [statistics.mean(found.values()) for run, found in accuracy.items() if run.startswith(system)]
            for system in ("layalign-", "mindmerger-")
        )
        assert min(own) > max(other), name
        if LLM_ALONE in accuracy:
            assert min(own) > statistics.mean(accuracy[LLM_ALONE].values()), name
    asked = {name for name, accuracy in results["accuracy"].items() if LLM_ALONE in accuracy}
    assert {"held_out", "new_wording", "hundred"} <= asked
    for run in runs:
        losses = results["loss"]["loss_tatoeba_task"][run]
        assert all(losses["shuffled"][language] - losses["true"][language] > 2 for language in losses["true"]), run


@pytest.mark.usefixtures("real_models")
def test_shipped_part_solves_held_out_problems():
    """Problems of a seed that no figure was made with."""
    model, processor = load_shipped()
    problems = [problem for problem in REAL.evaluation_problems(8, "fresh") if problem["lang"] in ("de", "sw", "th")]
    found = evaluate_problems(Answerer(model, processor, max_new_tokens=ANSWER_TOKENS, batch_size=24), problems)
    assert statistics.mean(found["accuracy"]["strict"].values()) >= 50


@pytest.mark.usefixtures("real_models")
def test_any_question_may_be_asked(capsys):
    answers = answer_shipped(["Neema ana kalamu saba. Neema anauza kalamu tatu. Neema ana kalamu ngapi sasa?"])
    assert answers[0] in capsys.readouterr().out and "=" in answers[0]


def test_the_part_after_the_translation_stage_translates(real_models):
    answer = Answerer(*load_shipped(TRANSLATION), max_new_tokens=24)
    told = answer(
        ["Кошка играет с мышью.", "Je ne savais pas que tu avais autant d'argent.", "Wanaume wakakwenda kazini."]
    )
    wanted = [("cat", "mouse"), ("money",), ("men", "work")]
    assert all(word in text for text, words in zip(told, wanted, strict=True) for word in words), told
