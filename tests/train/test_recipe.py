import dataclasses

import pytest
import yaml

from layalign.train.recipe import SHIPPED, DataSource, Recipe, StageRecipe, load_recipe
from layalign.train.settings import build

# (key to set, value, what the message must say)
WRONG = [
    ("stages.task.learning_rte", 1, "did you mean 'learning_rate'"),
    ("encoderr", "x", "encoderr: unknown setting; did you mean 'encoder'"),
    ("stages.tasks", {}, "stages.tasks"),
    ("stages.task.data.0.formt", "tsv", "stages.task.data.0.formt: unknown setting"),
    ("model.gats", "scalar", "model.gats: unknown setting; did you mean 'gate'"),
    ("model.gate", "skalar", "gate must be one of"),
    ("model.llm_input", {}, "model.llm_input: unknown setting"),
    ("llm_input.taks", True, "llm_input.taks"),
    ("llm_input.task", "yes please", "llm_input.task: expected true or false"),
    ("stages.task.learning_rate", "fast", "stages.task.learning_rate: expected a number, got the text 'fast'"),
    ("stages.task.learning_rate", float("nan"), "learning_rate: must be at least 0"),
    ("stages.task.learning_rate", -1.0, "learning_rate: must be at least 0 and at most 1, got -1.0"),
    ("stages.task.steps", True, "steps: expected a whole number, got the boolean True"),
    ("stages.task.steps", 1.5, "steps: expected a whole number, got float 1.5"),
    ("stages.task.steps", 0, "steps: must be at least 1"),
    ("stages.task.epochs", 2, "give steps or epochs, not both"),
    ("stages.task.batch_size", 0, "batch_size: must be at least 1"),
    ("stages.task.betas", [0.9], "betas: two numbers"),
    ("stages.task.betas", "0.9", "betas: expected a list"),
    ("stages.task.precision", "fp16", "precision: must be one of fp32, bf16"),
    ("stages.task.warmup_ratio", 1.0, "warmup_ratio"),
    ("stages.task.use_reentrant", True, "reentrant gradient checkpointing cannot work"),
    ("stages.task.prompt", None, "stages.task.prompt: required"),
    ("stages.task.prompt", "{question}", "prompt: takes {source} and {language}, got ['question']"),
    ("stages.task.prompt", "{source", "prompt: broken template"),
    ("stages.task.eval_steps", 5, "eval_steps: needs eval_data or hold_out"),
    ("stages.task.data", [], "data: at least one source"),
    ("stages.task.data", 3, "data: expected a list, got int 3"),
    ("stages.task.data.0.limit", 0, "stages.task.data.0.limit: must be at least 1"),
    ("stages.task.data.0.format", "json lines", "format: must be one of"),
    ("stages.task.data.0.path", "nowhere.jsonl", "data files not found"),
    ("stages.task.data.0.path", "part-{lang}.jsonl", "languages: required"),
    ("stages.task.data.0.path", "part-{step}.jsonl", "path: takes {lang} and {language}"),
    ("stages.task.data.0.target_path", "x", "target_path: is the second file of format 'pairs'"),
    ("stages.task.data.0.source", "{a.__class__}", "source: template fields are written"),
    ("stages.task.data.0.languages", [], "languages: empty list"),
    ("stages", {}, "stages: at least one of"),
    ("encoder", None, "encoder: expected a text, got nothing"),
    ("output", " ", "output: empty"),
    ("seed", -1, "seed: must be at least 0"),
    ("device", "gpu", "device: must be one of auto, cpu"),
]


def put(settings, key, value):
    *parents, last = key.split(".")
    for parent in parents:
        settings = settings[int(parent)] if isinstance(settings, list) else settings.setdefault(parent, {})
    settings[last] = value


@pytest.mark.parametrize(("key", "value", "message"), WRONG, ids=[f"{key}={value}" for key, value, _ in WRONG])
def test_wrong_settings_are_refused(recipe_file, key, value, message):
    settings = yaml.safe_load(recipe_file.read_text())
    stage = settings["stages"]["task"]
    stage["data"] = [stage["data"]]
    put(settings, key, value)
    recipe_file.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError) as caught:
        load_recipe(recipe_file)
    assert message in str(caught.value)
    assert str(recipe_file) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"encoder: [a", "not readable as YAML"),
        (b"- a\n- b\n", "a recipe is a mapping of settings, got list"),
        (b"", "a recipe is a mapping of settings, got NoneType"),
        (b"encoder: \xff\xfe", "not readable as YAML"),
        (b"encoder: a\n", "llm: required, but not given"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, content, message):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_recipe(file)


def test_a_missing_file_names_the_shipped_recipes(tmp_path):
    with pytest.raises(ValueError, match=r"no such recipe file; shipped recipes: math, small_real, xcsqa, xnli"):
        load_recipe(tmp_path / "absent.yaml")


def test_numbers_written_as_text_are_read(recipe_file):
    """YAML 1.1 takes 1e-4, without a point, for a text."""
    recipe = load_recipe(
        recipe_file, ["stages.task.learning_rate=1e-4", "stages.task.eps=1", "stages.task.data.limit=7"]
    )
    stage = recipe.stages["task"]
    assert (stage.learning_rate, stage.eps, stage.data[0].limit) == (1e-4, 1.0, 7)
    assert type(stage.eps) is float


def test_overrides_reach_every_level_and_make_missing_ones(recipe_file):
    overrides = ["seed=5", "model.gate=head", "stages.task.data.on_bad_line=skip", "llm_input.task=false"]
    recipe = load_recipe(
        recipe_file, [*overrides, "stages.task.prompt=null", "stages.translation.prompt=to {language}=en"]
    )
    assert (recipe.seed, recipe.model, recipe.llm_input) == (5, {"gate": "head"}, {"translation": False, "task": False})
    assert recipe.stages["task"].data[0].on_bad_line == "skip"
    assert recipe.stages["translation"].prompt == "to {language}=en"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected key=value"),
        ("=3", "expected key=value"),
        ("seed.x=3", "no 'x' inside the value"),
        ("stages.task.betas.5=3", "no '5' inside a list of 2"),
        ("stages.task.stepz=3", "did you mean 'steps'"),
        ("seed=[1", "not readable as YAML"),
    ],
)
def test_wrong_overrides(recipe_file, override, message):
    with pytest.raises(ValueError) as caught:
        load_recipe(recipe_file, ["seed=1", "stages.task.betas=[0.8, 0.9]", override])
    assert message in str(caught.value)


def test_records_and_format_belong_together():
    with pytest.raises(ValueError, match="none are given"):
        DataSource()
    with pytest.raises(ValueError, match="records are given"):
        DataSource(format="tsv", path="x", records=[])
    with pytest.raises(ValueError, match="expected a list of dicts, got str"):
        DataSource(records="abc")
    with pytest.raises(ValueError, match="path: required for format 'pairs'"):
        DataSource(format="pairs", target_path="x")
    with pytest.raises(ValueError, match="give lang or lang_field"):
        DataSource(format="tsv", path="x", lang="sw", lang_field="language")


def test_one_source_need_not_be_in_a_list(records):
    stage = StageRecipe(data=DataSource(records=records), eval_data={"records": records}, steps=3)
    assert len(stage.data) == len(stage.eval_data) == 1
    assert stage.epochs is None
    assert StageRecipe(data=DataSource(records=records)).epochs == 3


def test_a_path_with_a_language_stands_for_one_file_each(tmp_path):
    source = DataSource(
        format="pairs", path="en-{lang}/{language}.{lang}", target_path="en-{lang}/all.en", languages=["Swahili", "th"]
    )
    parts = source.located(tmp_path)
    assert [(part.path, part.lang) for part in parts] == [
        (f"{tmp_path}/en-sw/Swahili.sw", "sw"),
        (f"{tmp_path}/en-th/Thai.th", "th"),
    ]
    assert len(source.files(tmp_path)) == 4


PUBLISHED_LANGUAGES = {"math": 9, "xcsqa": 15, "xnli": 14}


@pytest.mark.parametrize("name", ["math", "xcsqa", "xnli"])
def test_shipped_recipes_have_the_published_settings(name):
    recipe = load_recipe(name, check_files=False)
    translation, task = recipe.stages["translation"], recipe.stages["task"]
    assert (translation.learning_rate, task.learning_rate) == (4e-5, 3e-5)
    for stage in (translation, task):
        assert stage.batch_size * stage.gradient_accumulation == 128
        assert (stage.epochs, stage.hold_out, stage.precision, stage.max_grad_norm) == (3, 3000, "bf16", 1.0)
        assert (stage.betas, stage.eps, stage.weight_decay, stage.warmup_ratio) == ([0.8, 0.999], 1e-8, 3e-7, 0.05)
    assert len(translation.data[0].languages) == PUBLISHED_LANGUAGES[name]
    assert translation.data[0].limit == 100_000
    assert task.source_max_length == task.target_max_length == (512 if name == "math" else 200)
    assert recipe.llm_input == {"translation": False, "task": True}


def test_every_shipped_recipe_is_tested():
    assert {file.stem for file in SHIPPED.glob("*.yaml")} == {*PUBLISHED_LANGUAGES, "small_real"}


def test_shipped_recipes_name_missing_data(tmp_path):
    with pytest.raises(ValueError, match=r"data files not found.*\n  stages.translation: .*en-bn/train_100k.bn"):
        load_recipe("math", [f"data_root={tmp_path}"])


def test_recipes_survive_a_round_trip(recipe_file):
    recipe = load_recipe(recipe_file)
    assert build(Recipe, dataclasses.asdict(recipe)) == recipe
