"""Optional packages: what needs none runs on the core alone, and a command that lacks one names the extra to install."""

import subprocess
import sys

import pytest

OPTIONAL = (
    "accelerate",
    "datasets",
    "gguf",
    "matplotlib",
    "num2words2",
    "sacrebleu",
)  # and rich and pydantic, which typer brings along
WITHOUT = """
import sys

missing, finders = {missing!r}, list(sys.meta_path)


class Without:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in missing:
            return None
        found = (finder.find_spec(name, path, target) for finder in finders)
        return next((spec for spec in found if spec is not None), None)

    @staticmethod
    def find_distributions(*context):
        every = (finder.find_distributions(*context) for finder in finders if hasattr(finder, "find_distributions"))
        return (found for some in every for found in some if found.name not in missing)


sys.meta_path[:] = [Without]
"""


def run_without(missing, code):
    command = [sys.executable, "-c", WITHOUT.format(missing=tuple(missing)) + code]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def layalign_without(missing, *arguments):
    arguments = ["layalign", *map(str, arguments)]
    return run_without(missing, f"sys.argv = {arguments!r}\nfrom layalign.cli import main\nmain()")


NEEDS = {
    "train {tmp}/recipe.yaml": ("train", ["accelerate"]),
    "evaluate {model} -t mgsm": ("eval", ["matplotlib", "rich", "datasets"]),
    "analyze {model}": ("eval", ["matplotlib", "rich", "datasets"]),
    "demo -o {tmp}/demo": ("demo", ["accelerate", "matplotlib", "num2words2", "rich"]),
}


@pytest.mark.parametrize(
    ("command", "missing"), [(command, package) for command, (_, packages) in NEEDS.items() for package in packages]
)
def test_a_missing_package_is_named_by_the_command_that_needs_it(command, missing, model_folder, tmp_path):
    words = command.format(tmp=tmp_path, model=model_folder).split()
    result = layalign_without([missing], *words)
    expected = (
        f'layalign: {words[0]} needs {missing}, which is not installed: pip install "layalign[{NEEDS[command][0]}]"\n'
    )
    assert (result.returncode, result.stdout, result.stderr) == (2, "", expected)
    assert not list(tmp_path.iterdir())


def test_the_core_alone_generates_converts_and_helps(model_folder, tmp_path):
    result = layalign_without(OPTIONAL, "generate", model_folder, "what is 3", "--max-new-tokens", "3")
    assert result.returncode == 0, result.stderr
    result = layalign_without(OPTIONAL, "convert", model_folder, tmp_path / "pytorch_model.bin", "--to-published")
    assert result.returncode == 0, result.stderr
    for command in ("demo", "train", "generate", "evaluate", "analyze", "convert", "kernels"):
        result = layalign_without(OPTIONAL, command, "--help")
        assert result.returncode == 0, result.stderr


def test_the_core_alone_imports_the_model_and_every_export():
    code = "import layalign, layalign.model, layalign.loading, layalign.generation.jobs\n"
    result = run_without(OPTIONAL, code + "for name in layalign.__all__: getattr(layalign, name)")
    assert result.returncode == 0, result.stderr


def test_kernels_are_not_compiled_without_triton():
    """Which only Linux installs."""
    result = layalign_without(["triton"], "kernels")
    expected = (
        "layalign: kernels needs triton, which is not installed: pip install triton, on Linux on x86-64 or 64-bit Arm\n"
    )
    assert (result.returncode, result.stdout, result.stderr) == (2, "", expected)


def test_a_package_of_no_extra_keeps_its_traceback():
    result = layalign_without(["transformers"], "generate", "nowhere", "what")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "transformers" in result.stderr
