"""The card that is saved with a model, and pushing it to a hub, which is a local folder here."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard

from layalign import LayAlignForConditionalGeneration, publishing
from layalign.model_card import StageFacts, model_card, write_card


@pytest.fixture
def evaluation(tmp_path):
    """A finished evaluation, as `layalign evaluate` writes it."""
    folder = tmp_path / "evaluation"
    folder.mkdir()
    summary = {"official": {"avg": 51.25, "lrl": None}}
    (folder / "results.json").write_text(json.dumps({"system": "m", "tasks": {"mgsm": {"summary": summary}}}))
    (folder / "table.md").write_text("## mgsm\n\n| | Avg. | sw |\n| --- | ---: | ---: |\n| m | 51.2 | 40.0 |\n")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """HfApi, with a folder for a hub."""

    class Hub:
        root = tmp_path / "hub"

        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, **kwargs):
            (self.root / repo_id).mkdir(parents=True, exist_ok=True)
            return type("Url", (), {"repo_id": repo_id})

        def file_exists(self, repo_id, name, revision=None):
            return (self.root / repo_id / name).is_file()

        def hf_hub_download(self, repo_id, name, revision=None):
            return str(self.root / repo_id / name)

        def create_branch(self, repo_id, *, branch, exist_ok):
            (self.root / repo_id / f"branch-{branch}").touch(exist_ok=exist_ok)

        def upload_folder(self, *, repo_id, folder_path, **kwargs):
            shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
            return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr(publishing, "HfApi", Hub)
    return Hub.root


def test_a_saved_model_has_a_card(loaded, tmp_path):
    model, _ = loaded
    model.save_pretrained(tmp_path / "named")
    card = ModelCard.load(tmp_path / "named" / "README.md")
    assert card.data.library_name == "layalign" and card.data.base_model is None
    assert "# named" in card.text and str(tmp_path) not in card.text, "no path of this machine"
    assert f"| adapter | {sum(p.numel() for p in model.adapter.parameters()):,} |" in card.text
    assert "| llm | llm |  | llama, 2 layers of width 32 |" in card.text
    assert "| gate | `'scalar'` |" in card.text
    (tmp_path / "named" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "named")
    assert (tmp_path / "named" / "README.md").read_text() == "mine"


def test_a_card_tells_bases_run_and_table(loaded, evaluation, tmp_path):
    model, _ = loaded
    config = model.config
    before = config.encoder_name_or_path, config.llm_name_or_path, config.base_sources
    try:
        config.encoder_name_or_path, config.llm_name_or_path = "google/mt5-xl", "some/llm"
        config.base_sources = {"llm": {"revision": "a" * 40, "subfolder": "hf"}}
        stage = StageFacts("task", ["`some/data` (dataset)"], ["sw", "de"], ["some/data"], {"steps": 7, "seed": None})
        card = model_card(model, "me/model", [stage], [evaluation])
    finally:
        config.encoder_name_or_path, config.llm_name_or_path, config.base_sources = before
    write_card(tmp_path, card)
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.base_model == ["google/mt5-xl", "some/llm"]
    assert read.data.language == ["de", "sw"] and read.data.datasets == ["some/data"]
    (result,) = read.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("mgsm", "official", 51.25)
    assert f"| llm | some/llm/hf | {'a' * 40} | llama" in read.text
    assert "- `some/data` (dataset)" in read.text and "| steps | 7 |" in read.text and "seed" not in read.text
    assert "### mgsm" in read.text and "| m | 51.2 | 40.0 |" in read.text
    with pytest.raises(ValueError, match="holds no finished evaluation"):
        model_card(model, "me/model", evaluations=[tmp_path / "none"])


def test_pushed_and_loaded_again(loaded, hub, evaluation, questions):
    model, processor = loaded
    commit = model.push_to_hub("me/model", processor=processor, evaluations=[evaluation], token="hf_x")
    assert commit == "https://hub/me/model/commit/1"
    assert "51.2" in (hub / "me/model" / "README.md").read_text()
    again = LayAlignForConditionalGeneration.from_pretrained(hub / "me/model")
    assert again.trained_state_dict().keys() == model.trained_state_dict().keys()
    assert type(processor).from_pretrained(hub / "me/model").prompt_template == processor.prompt_template
    (hub / "me/model" / "README.md").write_text("---\n{}\n---\nmine")
    model.push_to_hub("me/model")
    assert not [*(hub / "me/model").glob("branch-*")]
    for revision in ("next", "next", "refs/pr/3"):
        model.push_to_hub("me/model", revision=revision)
    assert [file.name for file in (hub / "me/model").glob("branch-*")] == ["branch-next"]
    assert (hub / "me/model" / "README.md").read_text().endswith("mine"), "someone's own card stays"
    with pytest.raises(ValueError, match="give one of both"):
        model.push_to_hub("me/model", card=ModelCard("---\n{}\n---\n"), evaluations=[evaluation])


def test_saved_and_pushed_at_once(loaded, hub, tmp_path):
    loaded[0].save_pretrained(tmp_path / "here", push_to_hub=True, repo_id="me/other")
    assert (hub / "me/other" / "model.safetensors").is_file() and (tmp_path / "here" / "config.json").is_file()
