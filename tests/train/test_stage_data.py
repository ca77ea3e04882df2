"""The cache of tokenised records: shared, whole or not there, and of constant memory."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from filelock import FileLock, Timeout

from layalign import LayAlignProcessor
from layalign.train.data import stage_data, token_store
from layalign.train.data.stage_data import read_stage_data, token_cache
from layalign.train.recipe import load_recipe
from layalign.train.stages import train

MAKE = """
import os, signal, sys, time
from layalign.train.data import encoding, token_store
from layalign.train.recipe import load_recipe
from layalign.train.data.stage_data import read_stage_data
from layalign import LayAlignProcessor
recipe = load_recipe(sys.argv[1])
processor = LayAlignProcessor.from_bases(recipe.encoder, recipe.llm)
encode, seal = encoding.RecordEncoder.encode, token_store.seal
def die(*given):
    os.kill(os.getpid(), signal.SIGKILL)
def slowly(self, lines):
    print("making", flush=True)
    sys.stdin.readline()
    return encode(self, lines)
if sys.argv[2] == "encode":
    encoding.RecordEncoder.encode = die
elif sys.argv[2] == "seal":
    token_store.seal = die
elif sys.argv[2] == "publish":
    token_store.publish = die
elif sys.argv[2] == "slowly":
    encoding.RecordEncoder.encode = slowly
print(read_stage_data("task", recipe, processor).train.digest(), flush=True)
"""


@pytest.fixture
def cached_recipe(recipe_file, tmp_path):
    """The recipe with a cache of its own."""
    settings = yaml.safe_load(recipe_file.read_text())
    settings["cache"] = str(tmp_path / "cache")
    recipe_file.write_text(yaml.safe_dump(settings))
    return recipe_file


def read(file, *overrides, name="task"):
    recipe = load_recipe(file, overrides)
    return read_stage_data(name, recipe, LayAlignProcessor.from_bases(recipe.encoder, recipe.llm))


def folders(file):
    return sorted(path for path in token_cache(load_recipe(file, check_files=False)).glob("[!.]*") if path.is_dir())


@pytest.fixture
def started(forks):
    """(file, how) -> a process that reads the data of a recipe."""
    pipe = subprocess.PIPE
    return lambda file, how: forks.start(["-c", MAKE, file, how], stdin=pipe, stdout=pipe, stderr=pipe)


def waits(process):
    """Whether a process comes to wait for another one."""
    return any("task: another process tokenises the same data; waiting for it" in line for line in process.stderr)


def test_what_was_tokenised_is_shared_and_what_differs_is_not(cached_recipe, monkeypatch):
    first = read(cached_recipe)
    (folder,) = folders(cached_recipe)
    with monkeypatch.context() as patch:
        patch.setattr(stage_data.RecordEncoder, "encode", None)
        for overrides in (
            ["seed=5"],
            [f"output={cached_recipe.parent / 'elsewhere'}"],
            ["stages.task.steps=9"],
            ["stages.task.hold_out=3"],
        ):
            again = read(cached_recipe, *overrides)
        assert len(again.train) + len(again.held_out) == len(first.train)
    path = load_recipe(cached_recipe).stages["task"].data[0].path
    values = [
        "stages.task.source_max_length=3",
        "stages.task.target_max_length=3",
        "stages.task.prompt='is : {source}'",
        f"stages.task.data={{format: jsonl, path: {path}, limit: 7}}",
    ]
    for number, value in enumerate(values, 2):
        assert read(cached_recipe, value).train.digest() != first.train.digest()
        assert len(folders(cached_recipe)) == number
    assert folder in folders(cached_recipe)


def test_rows_of_packed_files_are_not_counted_beforehand(cached_recipe, monkeypatch):
    """Their bytes hold other line feeds than the text: the bar of progress would be of as many."""
    source = Path(load_recipe(cached_recipe).stages["task"].data[0].path)
    key, totals = stage_data._key, []
    monkeypatch.setattr(stage_data, "_key", lambda *given: (found := key(*given), totals.append(found[1]))[0])
    plain = read(cached_recipe)
    source.write_bytes(gzip.compress(source.read_bytes()))
    packed = read(cached_recipe)
    assert totals == [10, None]
    assert packed.train.digest() == plain.train.digest()


def test_it_is_found_by_content_not_by_place(cached_recipe, tmp_path, caplog):
    source = Path(load_recipe(cached_recipe).stages["task"].data[0].path)
    source.write_text(source.read_text() + "{broken\n")

    def skipping(path):
        data = f"data={{format: jsonl, path: {path}, on_bad_line: skip}}"
        return [f"stages.{name}.{data}" for name in ("translation", "task")]

    first = read(cached_recipe, *skipping(source))
    moved = source.rename(tmp_path / "moved.jsonl")
    caplog.clear()
    assert read(cached_recipe, *skipping(moved)).train.digest() == first.train.digest()
    assert len(folders(cached_recipe)) == 1
    # A bad line is told of each time, by the name that its file has now.
    assert f"1 bad lines left out:\n  {moved}:11: not JSON" in caplog.text
    lines = moved.read_text().splitlines(keepends=True)
    lines[3] = lines[4]
    moved.write_text("".join(lines))
    assert read(cached_recipe, *skipping(moved)).train.digest() != first.train.digest()
    assert len(folders(cached_recipe)) == 2


@pytest.mark.parametrize("how", ["flipped", "cut", "missing", "manifest", "info"])
def test_a_damaged_cache_is_named_and_made_anew(cached_recipe, caplog, how):
    first = read(cached_recipe).train.digest()
    (folder,) = folders(cached_recipe)
    file = folder / {"manifest": "manifest.json", "info": "info.json"}.get(how, "text_ids")
    content = bytearray(file.read_bytes())
    if how in ("flipped", "info"):
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-3])
    assert read(cached_recipe).train.digest() == first
    assert f"task: the cached tokens in {folder} are of no use and made anew: {file.name}" in caplog.text
    assert folders(cached_recipe) == [folder]
    assert token_store.damage(folder) is None


@pytest.mark.parametrize("when", ["encode", "seal", "publish"])
def test_killed_while_it_is_made_nothing_of_it_is_used(cached_recipe, started, when):
    process = started(cached_recipe, when)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    cache = token_cache(load_recipe(cached_recipe))
    assert folders(cached_recipe) == []
    assert len(list(cache.glob(".*.partial"))) == 1
    data = read(cached_recipe).train
    assert len(data) == 10
    assert not list(cache.glob(".*"))


def test_of_two_at_once_one_makes_it_and_the_other_waits(cached_recipe, started):
    first = started(cached_recipe, "slowly")
    assert first.stdout.readline() == "making\n"
    second = started(cached_recipe, "slowly")
    assert waits(second)
    (made, _), (waited, said) = first.communicate("\n"), second.communicate()
    assert first.returncode == second.returncode == 0, said
    assert waited == made, "the second one made it too"


def test_the_one_that_waits_goes_on_when_the_first_is_killed(cached_recipe, started):
    first = started(cached_recipe, "slowly")
    assert first.stdout.readline() == "making\n"
    second = started(cached_recipe, "no")
    assert waits(second)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    out, said = second.communicate()
    assert second.returncode == 0, said
    assert out.strip() == read(cached_recipe).train.digest()


def test_an_entry_is_looked_through_without_the_lock(cached_recipe, monkeypatch):
    """So all that waited for it do so at once; what was put in its place meanwhile is looked through, too."""
    digest = read(cached_recipe).train.digest()
    (folder,) = folders(cached_recipe)
    seen = []

    def damage(path, found=token_store.damage):
        lock = FileLock(folder.with_name(f"{folder.name}.lock"))
        try:
            with lock.acquire(timeout=0):
                seen.append("free")
        except Timeout:
            seen.append("held")
        reason = found(path)
        if len(seen) == 1 and exchanged:
            (folder / "manifest.json").write_text("{}")
        return reason

    monkeypatch.setattr(token_store, "damage", damage)
    exchanged = False
    assert read(cached_recipe).train.digest() == digest and seen == ["free"]
    exchanged = not seen.clear()
    assert read(cached_recipe).train.digest() == digest and seen == ["free", "held"]
    assert json.loads((folder / "manifest.json").read_text())["files"], "it was made anew"


def test_what_is_being_made_is_no_entry(cached_recipe):
    """It is sealed before it is called as it will be, and would be taken from under its maker by a clearing."""
    read(cached_recipe)
    (folder,) = folders(cached_recipe)
    folder.rename(folder.with_name(f".{folder.name}.host.1.partial"))
    assert token_store.entries(folder.parent) == []


def test_a_run_that_failed_leaves_no_tokens(cached_recipe):
    source = Path(load_recipe(cached_recipe).stages["task"].data[0].path)
    source.write_text(source.read_text() + "{broken\n")
    with pytest.raises(ValueError, match=r"data.jsonl:11: not JSON"):
        read(cached_recipe)
    assert not [path for path in token_cache(load_recipe(cached_recipe)).iterdir() if path.suffix != ".lock"]


def test_a_cache_that_cannot_be_written_to_is_named(cached_recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache: .*file/tokens cannot be made: .*LAYALIGN_CACHE"):
        read(cached_recipe, f"cache={tmp_path / 'file'}")


def test_from_files_a_run_is_bit_identical_with_one_from_memory(cached_recipe, settings, records):
    settings["stages"]["task"] |= {"hold_out": 3, "eval_steps": 2}
    from_memory = train(load_recipe_of(settings))
    weights = (Path(settings["output"]) / "model" / "model.safetensors").read_bytes()
    overrides = [f"output={settings['output']}-files", "stages.task.hold_out=3", "stages.task.eval_steps=2"]
    for _ in range(2):
        recipe = load_recipe(cached_recipe, [*overrides])
        assert train(recipe).history == from_memory.history
        assert (Path(recipe.output) / "model" / "model.safetensors").read_bytes() == weights
        overrides[0] += "-again"


def load_recipe_of(settings):
    from layalign.train.recipe import Recipe
    from layalign.train.settings import build

    return build(Recipe, settings)


def test_lazy_records_are_read_as_a_stream_and_tokenised_once(settings, records, tmp_path, caplog):
    import datasets

    reads = []

    def lazily():
        reads.append(1)
        yield from records

    settings["cache"] = str(tmp_path / "cache")
    wanted = None
    for lazy in (records, lazily, lazily, datasets.Dataset.from_list(records)):
        settings["stages"]["task"]["data"] = {"records": lazy}
        recipe = load_recipe_of(settings)
        data = read_stage_data("task", recipe, LayAlignProcessor.from_bases(recipe.encoder, recipe.llm)).train
        wanted = wanted or data.digest()
        assert data.digest() == wanted
    # To know them and to tokenise them, and then to know them again.
    assert len(reads) == 3
    assert len(list(token_cache(recipe).glob("[!.]*/"))) == 1
    assert train(load_recipe_of({**settings, "output": str(tmp_path / "whole")})).history["task"]


def test_the_command_lists_and_clears(cached_recipe, monkeypatch, capsys):
    from layalign.cli import app

    def cache(*words):
        with pytest.raises(SystemExit) as left:
            app(["cache", "--folder", load_recipe(cached_recipe).cache, *words])
        assert left.value.code == 0
        return capsys.readouterr().out

    assert "0.0 MB in 0 entries" in cache()
    data = read(cached_recipe).train
    read(cached_recipe, name="translation")
    recent, old = folders(cached_recipe)
    os.utime(old / "manifest.json", (0, time.time() - 10 * 86400))
    listed = cache()
    assert "10 records, task: " in listed and "10 records, translation: " in listed and "in 2 entries" in listed
    assert listed.index(recent.name) < listed.index(old.name)
    cache("--clear", "--unused", "5")
    assert folders(cached_recipe) == [recent]
    (recent.parent / ".0123.host.1.partial").mkdir()
    assert "MB removed" in cache("--clear")
    assert not [path for path in recent.parent.iterdir() if path.suffix != ".lock"]
    assert len(data[9].text) > 0, "what a run has mapped stays"
    with pytest.raises(ValueError, match="--unused goes with --clear"):
        app(["cache", "--unused", "5"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_ten_times_the_data_take_no_more_memory(tmp_path):
    grown = {}
    for lines in (5_000, 50_000):
        command = [sys.executable, str(Path(__file__).with_name("constant_memory.py")), str(lines), str(tmp_path)]
        done = subprocess.run([*command, "stages.translation.steps=3"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["first"]["records"] == lines - 64
        grown[lines] = found["first"]["grown_mb"]["anonymous"]
    # 45,000 records more are 40 MB as Python objects and arrays; what is held of them, lengths and order, is 2 MB.
    assert grown[50_000] - grown[5_000] < 20, grown


def test_languages_are_kept(cached_recipe, records):
    source = Path(load_recipe(cached_recipe).stages["task"].data[0].path)
    codes = ["sw", "de", "fr", "sw", "sw", "de", "sw", "fr", "sw", "de"]
    rows = [{**record, "lang": code} for record, code in zip(records, codes, strict=True)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, held_out = read(cached_recipe, "stages.task.hold_out=4")
    order = np.random.default_rng(0).permutation(10)
    for found, places in ((data, np.sort(order[4:])), (held_out, order[:4])):
        assert [found.language_names[number] for number in found.languages] == [codes[place] for place in places]
        assert found.languages.dtype == np.uint16
