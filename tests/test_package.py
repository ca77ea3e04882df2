"""What is installed: the wheel and the sdist, built without network, and the command line of the unpacked wheel."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from typer.main import get_command

import layalign
from layalign.cli import app

ROOT = Path(__file__).parents[1]
FOLDERS = {"layalign.kernels": "kernels", "layalign": "layalign", "layalign.train": "train"}
OPTIONAL = ("accelerate", "datasets", "gguf", "matplotlib", "num2words2", "sacrebleu", "tensorboard")


def python(arguments, **kwargs):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, **kwargs
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the wheel and the sdist. setup.py itself is called: a build in an environment of its own needs a network."""
    folder = tmp_path_factory.mktemp("dist")
    egg = ["egg_info", "--egg-base", str(folder)]
    for command in (
        [*egg, "build", "--build-base", str(folder / "build"), "bdist_wheel", "--dist-dir", str(folder)],
        [*egg, "sdist", "--dist-dir", str(folder)],
    ):
        result = python(["setup.py", "-q", *command], cwd=ROOT)
        assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel, unpacked: a folder for PYTHONPATH, which goes before an editable installation."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def in_wheel(installed, arguments, folder, **variables):
    """Run Python on the unpacked wheel, outside the checkout."""
    environment = os.environ | {"PYTHONPATH": str(installed), "COLUMNS": "120"} | variables
    return python(arguments, cwd=folder, env=environment)


def source_files(package):
    files = sorted((ROOT / FOLDERS[package]).rglob("*.py"))
    links = (ROOT / "layalign" / "kernels", ROOT / "layalign" / "train")
    return [path for path in files if package != "layalign" or not any(link in path.parents for link in links)]


def test_wheel_holds_everything_once(wheel):
    """It installs `layalign` alone: no top-level `kernels` or `train`, no file twice, data included, report pictures not."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"layalign"}
    assert len(names) == len(set(names))
    for package, folder in FOLDERS.items():
        for path in source_files(package):
            expected = "/".join((*package.split("."), *path.relative_to(ROOT / folder).parts))
            assert expected in names, expected
    assert any(name.startswith("layalign/bases/") and name.endswith(".safetensors") for name in names)
    assert any(name.startswith("layalign/train/") and name.endswith("/model.safetensors") for name in names)
    assert "layalign/train/recipes/math.yaml" in names and "layalign/train/tables/16.yaml" in names
    assert "layalign/py.typed" in names
    assert not [name for name in names if name.endswith((".png", ".svg", ".pyc", "LOG.md"))]
    assert not [name for name in names if name.startswith(("layalign/bench", "layalign/kernels/kernels"))]


def test_every_data_file_is_in_the_wheel(wheel):
    """Whatever lies beside the code and is tracked; readers have pictures, logs and reports besides, and trainers a part to begin with."""
    apart = {
        "report",
        "further_report",
        "last_report",
        "tables_report",
        "translation",
        "mindmerger_translation",
        "task",
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = git_listing("ls-files", "-z", *FOLDERS.values())
    if tracked is None:
        pytest.skip("not a git checkout")
    for name in tracked:
        path = Path(name)
        if path.suffix not in (".py", ".png", ".md", "") and (ROOT / path).is_file() and not apart & {*path.parts}:
            expected = path if path.parts[0] == "layalign" else Path("layalign") / path
            assert expected.as_posix() in names, expected


def git_listing(*arguments):
    """Lines of `git ...`, parted by NUL; None where there is no git."""
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return [name for name in result.stdout.split("\0") if name]


def test_wheel_is_little_more_than_its_weights(wheel):
    with zipfile.ZipFile(wheel) as archive:
        weights = sum(entry.compress_size for entry in archive.infolist() if entry.filename.endswith(".safetensors"))
    assert wheel.stat().st_size < weights + 900_000  # the stories in ten languages are 30 kB of it
    assert wheel.stat().st_size < 7_500_000


def test_every_manifest_of_the_wheel_holds(installed):
    """A sealed folder from which the wheel leaves files out would be taken for a damaged one."""
    manifests = sorted(installed.rglob("manifest.json"))
    assert manifests
    for manifest in manifests:
        for name, expected in json.loads(manifest.read_text(encoding="utf-8"))["files"].items():
            assert (manifest.parent / name).is_file(), f"{manifest.parent.relative_to(installed)} lacks {name}"
            assert (manifest.parent / name).stat().st_size == expected["size"]


def test_metadata(installed):
    (found,) = importlib.metadata.distributions(path=[str(installed)])
    metadata = found.metadata
    assert metadata["Name"] == "layalign"
    assert metadata["Version"] == layalign.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    urls = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL"))
    assert {"Homepage", "Repository", "Documentation", "Paper"} <= urls.keys()
    assert urls["Paper"] == "https://arxiv.org/abs/2502.11405"
    extras = set(metadata.get_all("Provides-Extra"))
    assert {"train", "eval", "demo", "all", "tensorboard", "flash", "lm-eval", "test", "lint", "docs", "dev"} <= extras
    core = [line for line in found.requires if "extra ==" not in line]
    assert {re.split(r"[<>=; ]", line)[0] for line in core} == {
        "torch",
        "triton",
        "transformers",
        "safetensors",
        "typer",
        "tqdm",
    }
    scripts = {script.name: script.value for script in found.entry_points.select(group="console_scripts")}
    assert scripts == {"layalign": "layalign.cli:main", "layalign-lm-eval": "layalign.harness:main"}
    plugins = {plugin.name: plugin.value for plugin in found.entry_points.select(group="vllm.general_plugins")}
    assert plugins == {"layalign": "layalign.serving:register"}


def commands(command, names=()):
    """Every command of the command line, groups included, as tuples of words."""
    yield names
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from commands(inner, (*names, name))


def test_every_command_has_help_without_the_extras(installed, tmp_path):
    """`layalign ... --help` of the wheel, with nothing but the core's dependencies."""
    known = list(commands(get_command(app)))
    assert {("demo",), ("train",), ("generate",), ("evaluate",), ("kernels",)} <= set(known)
    for names in known:
        result = in_wheel(installed, ["-c", without_extras(), *names, "--help"], tmp_path)
        assert result.returncode == 0, (names, result.stderr)
        expected = "bench/" if names[:1] == ("bench",) else "Usage"  # the benchmarks stay in the repository
        assert expected in result.stdout and str(installed) in result.stderr, names


def without_extras():
    """Code of a `layalign` command whose optional packages are not there; tells where layalign is from."""
    return (
        f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"
        "import layalign; print(layalign.__file__, file=sys.stderr)\n"
        "from layalign.cli import main; main()"
    )


def test_core_runs_without_the_extras(installed, tmp_path):
    """Model, processor, generation and the operators."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"
        "import layalign\n"
        "for name in layalign.__all__: getattr(layalign, name)\n"
        "bases = 'layalign:tiny_encoder', 'layalign:tiny_llm'\n"
        "model = layalign.LayAlignForConditionalGeneration.from_bases(*bases).eval()\n"
        "processor = layalign.LayAlignProcessor.from_bases(*bases)\n"
        "model.save_pretrained('model'); processor.save_pretrained('model')\n"
    )
    result = in_wheel(installed, ["-c", code], tmp_path)
    assert result.returncode == 0, result.stderr
    words = ["-c", without_extras(), "generate", "model", "Tom has two pens.", "--max-new-tokens", "2"]
    result = in_wheel(installed, words, tmp_path)
    assert result.returncode == 0, result.stderr


def test_sdist_holds_what_a_distributor_needs(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    for name in (
        ".ci/run",
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "LICENSE",
        "MANIFEST.in",
        "Makefile",
        "README.md",
        "bench/conftest.py",
        "docs/index.md",
        "kernels/adaptive_fusion_attention/__init__.py",
        "layalign/py.typed",
        "mkdocs.yml",
        "pyproject.toml",
        "setup.py",
        "tests/conftest.py",
        "tests/test_package.py",
        "train/recipes/math.yaml",
    ):
        assert name in members, name
    for name in ("kernels", "train"):
        assert members[f"layalign/{name}"].issym() and members[f"layalign/{name}"].linkname == f"../{name}"
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    assert tests <= members.keys()
    assert not [name for name in members if name.endswith(".pyc") or name.startswith(("runs/", ".venv/", "shared/"))]
