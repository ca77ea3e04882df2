import dataclasses
import json

import pytest
import torch
import yaml

from layalign.train import recipe as recipe_module
from layalign.train.data.data_source import DataSource
from layalign.train.data.sources import read_sources
from layalign.train.recipe import SHIPPED, InitFrom, Recipe, load_recipe, recipe_schema
from layalign.train.settings import build, read_yaml
from layalign.train.stage_recipe import StageRecipe
from tests.train.wrong_settings import MISSING_PACKAGES, WRONG


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


@pytest.mark.parametrize(("reporter", "package"), MISSING_PACKAGES.items())
@pytest.mark.parametrize("several", [False, True])
def test_a_reporter_that_is_not_installed_is_named(recipe_file, monkeypatch, reporter, package, several):
    find = recipe_module.find_spec
    monkeypatch.setattr(recipe_module, "find_spec", lambda name: None if name == package else find(name))
    monkeypatch.setattr(recipe_module, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match=rf"report_to: {reporter} is not installed; pip install {package}$"):
        load_recipe(recipe_file, [f"report_to={['tensorboard', reporter] if several else reporter}"])


def test_a_folder_is_no_reporter(recipe_file, monkeypatch, tmp_path):
    """Runs leave one named wandb where they were started, and Python takes that for a package."""
    for name in ("wandb", "trackio"):
        (tmp_path / name).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("wandb", "trackio"):
        with pytest.raises(ValueError, match=rf"report_to: {name} is not installed; pip install {name}$"):
            load_recipe(recipe_file, [f"report_to={name}"])


def test_a_reporter_that_is_switched_off(recipe_file, monkeypatch, tmp_path):
    (tmp_path / "mlflow.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DISABLE_MLFLOW_INTEGRATION", "TRUE")
    with pytest.raises(ValueError, match="report_to: mlflow is installed, but transformers finds it switched off"):
        load_recipe(recipe_file, ["report_to=mlflow"])


def test_a_reporter_that_is_broken(recipe_file, monkeypatch, tmp_path):
    (tmp_path / "wandb.py").write_text("import nothing_of_that_name")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="report_to: a reporter's package is broken: No module named 'nothing_of_that"):
        load_recipe(recipe_file, ["report_to=wandb"])


def test_the_command_names_the_reporter_in_one_line(recipe_file, monkeypatch, capsys):
    from layalign import cli

    find = recipe_module.find_spec
    monkeypatch.setattr(recipe_module, "find_spec", lambda name: None if name == "wandb" else find(name))
    monkeypatch.setattr(recipe_module, "get_available_reporting_integrations", lambda: ["tensorboard"])
    monkeypatch.setattr("sys.argv", ["layalign", "train", str(recipe_file), "report_to=wandb"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2
    assert said == f"layalign: {recipe_file}: report_to: wandb is not installed; pip install wandb"


def test_reporters_are_one_or_several(recipe_file):
    assert load_recipe(recipe_file).report_to == ["none"]
    assert load_recipe(recipe_file, ["report_to=tensorboard"]).report_to == ["tensorboard"]
    assert load_recipe(recipe_file, ["report_to=[tensorboard]"]).report_to == ["tensorboard"]


@pytest.mark.parametrize(
    ("global_batch_size", "batch_size", "processes", "expected"),
    [(128, 8, 1, 16), (128, 8, 8, 2), (128, 2, 64, 1), (6, 3, 2, 1), (None, 8, 8, 1)],
)
def test_a_global_batch_divides_itself(records, global_batch_size, batch_size, processes, expected):
    stage = StageRecipe(data=[{"records": records}], global_batch_size=global_batch_size, batch_size=batch_size)
    assert stage.accumulation(processes) == expected
    assert StageRecipe(data=[{"records": records}], gradient_accumulation=3).accumulation(processes) == 3


@pytest.mark.parametrize(
    ("batch_size", "processes", "message"),
    [
        (8, 3, r"128 examples do not divide into forward calls of 24 \(3 processes x batch_size 8\); 120 would"),
        (8, 5, r"calls of 40 \(5 processes x batch_size 8\); 120 would"),
        (8, 32, r"calls of 256 \(32 processes x batch_size 8\); 256 would"),
    ],
)
def test_a_global_batch_that_does_not_divide(records, batch_size, processes, message):
    stage = StageRecipe(data=[{"records": records}], global_batch_size=128, batch_size=batch_size)
    with pytest.raises(ValueError, match="global_batch_size: " + message if message[0] == "1" else message):
        stage.accumulation(processes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"encoder: [a", "not readable as YAML"),
        (b"- a\n- b\n", "a recipe is a mapping of settings, got list"),
        (b"", "a recipe is a mapping of settings, got NoneType"),
        (b"encoder: \xff\xfe", "not readable as YAML"),
        (b"encoder: a\n", "llm: required, but not given"),
        (b"seed: 1\nllm: a\nseed: 2\n", "found the key 'seed' twice"),
        (b"stages: {task: {eps: 1, eps: 2}}\n", "found the key 'eps' twice"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, content, message):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_recipe(file)


def test_a_missing_file_names_the_shipped_recipes(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"no such recipe file; shipped recipes: langbridge_english, math, math_english, math_qwen, small_real, xcsqa, xnli",
    ):
        load_recipe(tmp_path / "absent.yaml")


def test_numbers_written_as_text_are_read(recipe_file):
    """YAML 1.1 takes 1e-4, without a point, for a text."""
    recipe = load_recipe(
        recipe_file, ["stages.task.learning_rate=1e-4", "stages.task.eps=1", "stages.task.data.limit=7"]
    )
    stage = recipe.stages["task"]
    assert (stage.learning_rate, stage.eps, stage.data[0].limit) == (1e-4, 1.0, 7)
    assert type(stage.eps) is float


def test_a_merged_mapping_may_be_written_over():
    """YAML's way to begin with another mapping."""
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}"
    assert read_yaml(text) == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}}


@pytest.mark.parametrize(
    ("given", "name"),
    [("bf16", "bfloat16"), (torch.float16, "float16"), ("torch.float32", "float32"), ("auto", None), (None, None)],
)
def test_dtypes_have_one_name(recipe_file, given, name):
    settings = yaml.safe_load(recipe_file.read_text())
    assert build(Recipe, settings | {"model": {"dtype": given}}).model == {"dtype": name}


def test_overrides_reach_every_level_and_make_missing_ones(recipe_file):
    overrides = ["seed=5", "model.gate=head", "stages.task.data.on_bad_line=skip", "llm_input.task=false"]
    recipe = load_recipe(
        recipe_file, [*overrides, "stages.task.prompt=null", "stages.translation.prompt=to {language}=en"]
    )
    assert (recipe.seed, recipe.model, recipe.llm_input) == (5, {"gate": "head"}, {"translation": False, "task": False})
    assert recipe.stages["task"].data[0].on_bad_line == "skip"
    assert recipe.stages["translation"].prompt == "to {language}=en"


def test_an_override_of_what_aliases_share_is_its_own_stages(recipe_file):
    text = yaml.safe_load(recipe_file.read_text())
    text["stages"]["translation"]["data"] = text["stages"]["task"]["data"]
    recipe_file.write_text(yaml.safe_dump(text))
    assert "&id001" in recipe_file.read_text()
    stages = load_recipe(recipe_file, ["stages.task.data.limit=3"]).stages
    assert [stages["translation"].data[0].limit, stages["task"].data[0].limit] == [None, 3]
    recipe_file.write_text("stages: &all {task: *all}\n")
    with pytest.raises(ValueError, match="not readable as YAML"):
        load_recipe(recipe_file)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stages.task.per_device_train_batch_size=4",
            "per_device_train_batch_size: unknown setting; it is batch_size here",
        ),
        ("stages.task.max_steps=4", "max_steps: unknown setting; it is steps here"),
        ("max_steps=4", "max_steps: unknown setting here; it belongs in a stage, as stages.NAME.steps"),
        ("learning_rate=4", "learning_rate: unknown setting here; it belongs in a stage, as stages.NAME.learning_rate"),
        ("output_dir=x", "output_dir: unknown setting; it is output here"),
    ],
)
def test_names_of_transformers_trainer_are_told_apart(recipe_file, override, message):
    with pytest.raises(ValueError) as caught:
        load_recipe(recipe_file, [override])
    assert message in str(caught.value)


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


def test_a_code_stands_in_paths_as_it_is_written(tmp_path):
    """OPUS and NLLB call files so; records are compared by the code in lower case, or of two letters."""
    codes = ["yor_Latn", "swh_Latn", "zh_CN"]
    for code in codes:
        (tmp_path / f"NLLB.{code}.txt").write_text("a\n")
    source = DataSource(format="pairs", path="NLLB.{lang}.txt", target_path="NLLB.zh_CN.txt", languages=codes)
    assert [path.name for path in source.files(tmp_path)][::2] == [f"NLLB.{code}.txt" for code in codes]
    assert [record["lang"] for record in read_sources([source], tmp_path)[0]] == ["yor_latn", "sw", "zh_cn"]
    records = [{"source": "a", "target": "b", "lang": lang} for lang in ("YOR_latn", "sw", "th")]
    found = read_sources([DataSource(records=records, languages=codes[:2])])[0]
    assert [record["lang"] for record in found] == ["yor_latn", "sw"]


def test_english_names_stand_in_either_path():
    source = DataSource(format="pairs", path="a.{lang}", target_path="b.{language}", languages=["sw", "deu_Latn"])
    assert [(part.path, part.target_path) for part in source.located()] == [
        ("a.sw", "b.Swahili"),
        ("a.deu_Latn", "b.German"),
    ]


PUBLISHED_LANGUAGES = {"math": 9, "math_english": 9, "math_qwen": 9, "xcsqa": 15, "xnli": 14}


@pytest.mark.parametrize("name", PUBLISHED_LANGUAGES)
def test_shipped_recipes_have_the_published_settings(name):
    recipe = load_recipe(name, check_files=False)
    translation, task = recipe.stages["translation"], recipe.stages["task"]
    assert (recipe.encoder, recipe.model["adapter"], recipe.model["aligner"]) == ("google/mt5-xl", "mlp", "linear")
    assert (translation.learning_rate, task.learning_rate) == (4e-5, 3e-5)
    for stage in (translation, task):
        assert stage.global_batch_size == 128
        for processes in (1, 2, 4, 8, 16):
            assert stage.accumulation(processes) * stage.batch_size * processes == 128
        assert (stage.epochs, stage.hold_out, stage.precision, stage.max_grad_norm) == (3, 3000, "bf16", 1.0)
        assert (stage.betas, stage.eps, stage.weight_decay, stage.warmup_ratio) == ([0.8, 0.999], 1e-8, 3e-7, 0.05)
        assert stage.schedule == "cosine"
    assert (translation.keep, translation.eval_steps, task.keep) == ("best", 200, "last")
    assert len(translation.data[0].languages) == PUBLISHED_LANGUAGES[name]
    assert translation.data[0].limit == 100_000
    assert translation.source_max_length == translation.target_max_length == 200
    assert task.source_max_length == task.target_max_length == (512 if name.startswith("math") else 200)
    # English questions would be a shortcut past the encoder (Table 6).
    assert recipe.llm_input == {"translation": False, "task": name != "math_english"}
    assert recipe.output == f"runs/{name}"


def test_recipes_over_the_same_data_differ_where_the_paper_says():
    """Table 6: the task data and what the LLM reads of them. Figure 3: the LLM."""
    math, english, qwen = (
        dataclasses.asdict(load_recipe(name, check_files=False)) for name in ("math", "math_english", "math_qwen")
    )
    assert english["stages"]["translation"] == math["stages"]["translation"]
    differing = {key for key, value in math["stages"]["task"].items() if english["stages"]["task"][key] != value}
    assert differing == {"data", "prompt"}
    assert {key for key, value in math.items() if qwen[key] != value} == {"llm", "output"}


def test_every_shipped_recipe_is_tested():
    assert {file.stem for file in SHIPPED.glob("*.yaml")} == {*PUBLISHED_LANGUAGES, "small_real", "langbridge_english"}
    small = load_recipe("small_real", check_files=False)
    assert [stage.steps for stage in small.stages.values()] == [200, 800]


def test_langbridges_own_recipe():
    """One stage of a linear adapter and the encoder's embeddings, as its authors' script for MetaMath trains them."""
    recipe = load_recipe("langbridge_english", check_files=False)
    stage = recipe.stages["task"]
    assert list(recipe.stages) == ["task"]
    assert (recipe.model["adapter"], recipe.model["aligner"], recipe.llm_input["task"]) == ("linear", None, False)
    assert (recipe.train_encoder, stage.encoder_learning_rate) == ("embeddings", 2e-5)
    assert (stage.learning_rate, stage.epochs, stage.global_batch_size, stage.source_max_length) == (6e-4, 1, 128, 1024)
    assert (stage.schedule, stage.warmup_ratio, stage.weight_decay, stage.max_grad_norm) == ("constant", 0, 0, 1.0)
    assert stage.target_max_length == 1024, "theirs is 1152 less the source's tokens"
    assert all(stage.accumulation(processes) * stage.batch_size * processes == 128 for processes in (1, 4, 8))


def test_shipped_recipes_name_missing_data(tmp_path):
    with pytest.raises(ValueError, match=r"data files not found.*\n  stages.translation: .*en-bn/train_100k.bn"):
        load_recipe("math", [f"data_root={tmp_path}"])


def test_recipes_survive_a_round_trip(recipe_file):
    recipe = load_recipe(recipe_file)
    assert build(Recipe, dataclasses.asdict(recipe)) == recipe


def test_no_setting_takes_a_boolean_for_a_number_or_a_word_for_a_boolean(recipe_file):
    """pydantic's own int, float and bool do; a field added with one of these is found here."""
    values = dataclasses.asdict(load_recipe(recipe_file))
    stage = values["stages"]["task"]
    places = [(Recipe, values), (StageRecipe, stage), (DataSource, stage["data"][0]), (InitFrom, {"path": "a"})]
    tried = 0
    for kind, whole in places:
        for field in dataclasses.fields(kind):
            annotation = str(field.type)
            for wrong, type_name in ((True, "int"), (True, "float"), ("yes", "bool")):
                if type_name in annotation and "dict" not in annotation and "list" not in annotation:
                    with pytest.raises(ValueError, match=f"^{field.name}: expected"):
                        build(kind, {**whole, field.name: wrong})
                    tried += 1
    assert tried >= 25


def test_all_wrong_settings_are_named_at_once(recipe_file):
    overrides = [
        "seed=-1",
        "stages.task.steps=0",
        "stages.translation.betas=[2, 0.9]",
        "llm_input.task=maybe",
        "stages.tasks={}",
    ]
    with pytest.raises(ValueError) as caught:
        load_recipe(recipe_file, overrides)
    lines = str(caught.value).partition(": ")[2].split("\n  ")
    assert sorted(line.partition(":")[0] for line in lines) == [
        "llm_input.task",
        "seed",
        "stages.task.steps",
        "stages.tasks",
        "stages.translation.betas.0",
    ]


def test_the_shipped_schema_is_that_of_recipes():
    """Where it is not: python -m layalign.train.recipe > train/recipes/schema.json"""
    assert json.loads((SHIPPED / "schema.json").read_text()) == recipe_schema()


def test_the_schema_explains_every_setting_that_its_name_does_not():
    kinds = recipe_schema()["$defs"] | {"Recipe": recipe_schema()}
    bare = {
        f"{kind}.{name}"
        for kind in kinds
        for name, field in kinds[kind]["properties"].items()
        if "description" not in field
    }
    assert bare == {"StageRecipe.learning_rate", "StageRecipe.gradient_checkpointing"}


def test_shipped_recipes_name_their_schema_for_editors():
    for file in SHIPPED.glob("*.yaml"):
        assert file.read_text().startswith("# yaml-language-server: $schema=schema.json\n")
