"""The layout: names we do not claim, one-way imports, a light `import layalign`."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Package -> the other packages of ours that it may import. The command line is above all of them.
MAY_IMPORT = {
    "layalign.kernels": {"layalign.kernels"},
    "layalign": {"layalign.kernels", "layalign"},
    "layalign.train": {"layalign.kernels", "layalign", "layalign.train"},
}
FOLDERS = {"layalign.kernels": "kernels", "layalign": "layalign", "layalign.train": "train"}
FORBIDDEN = {"layalign.kernels": {"transformers", "datasets", "accelerate", "safetensors"}, "layalign": {"accelerate"}}


def run(code, **kwargs):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def imported(path):
    """(line, absolute module name) of every import in a file, function bodies included."""
    package = ".".join(("layalign", *path.relative_to(ROOT).parts[:-1])) if path.parts[0] != "layalign" else ""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1]
            yield node.lineno, ".".join([*base, node.module or ""]).rstrip(".")


def owner(module):
    if not module.startswith("layalign"):
        return None
    return next(
        name for name in ("layalign.kernels", "layalign.train", "layalign") if (module + ".").startswith(name + ".")
    )


def source_files(package):
    files = sorted((ROOT / FOLDERS[package]).rglob("*.py"))
    links = (ROOT / "layalign" / "kernels", ROOT / "layalign" / "train")
    return [path for path in files if package != "layalign" or not any(link in path.parents for link in links)]


@pytest.mark.parametrize("package", FOLDERS)
def test_imports_go_one_way(package):
    files = source_files(package)
    assert files
    wrong = []
    for path in files:
        if path == ROOT / "layalign" / "cli.py":
            continue
        for line, module in imported(path):
            if owner(module) and owner(module) not in MAY_IMPORT[package]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
            if module.split(".")[0] in FORBIDDEN.get(package, ()):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_references_and_fast_backends_do_not_import_each_other():
    for operator in ("adaptive_fusion_attention", "layerwise_aligner"):
        folder = ROOT / "kernels" / operator
        for path in folder.glob("*.py"):
            names = [module.split(".")[-1] for _, module in imported(path)]
            if path.stem != "__init__" and path.stem != "reference":
                assert "reference" not in names, f"{path.name} of {operator} imports the reference"
            if path.stem == "reference":
                assert not any(name.endswith("backend") or name.startswith("triton") for name in names)


def test_no_package_of_ours_is_called_kernels_or_train():
    for name in ("kernels", "train"):
        assert not (ROOT / name / "__init__.py").exists()
        assert (ROOT / "layalign" / name).is_symlink()
        assert os.readlink(ROOT / "layalign" / name) == f"../{name}"
    names = {path.stem for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    assert not names & {"torch", "transformers", "datasets", "tokenizers", "accelerate", "safetensors", "triton"}


def test_import_is_light():
    """No torch, no transformers, under 0.3 s (best of three: the machine may be busy)."""
    code = (
        "import sys, time; start = time.perf_counter(); import layalign; seconds = time.perf_counter() - start\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules, 'heavy import'\n"
        "print(seconds)"
    )
    assert min(float(run(code)) for _ in range(3)) < 0.3


def test_operators_do_not_import_transformers():
    run(
        "import sys, layalign; layalign.adaptive_fusion_attention, layalign.cross_key_values\nassert 'transformers' not in sys.modules"
    )


def test_every_exported_name_resolves():
    run("import layalign\nfor name in layalign.__all__: getattr(layalign, name)")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        import layalign

        _ = layalign.nothing


def test_the_root_does_not_shadow_the_name_kernels():
    """Started at the repository's root, `import kernels` must find no regular package of ours."""
    code = "import importlib.util as u; spec = u.find_spec('kernels'); print(spec is None or spec.origin is None)"
    assert run(code, cwd=ROOT) == "True"


def test_wheel_holds_everything_once(tmp_path):
    """A wheel, built without network, installs `layalign` alone: no top-level `kernels` or `train`, no file twice, data included."""
    result = subprocess.run(
        [
            sys.executable,
            "setup.py",
            "-q",
            "build",
            "--build-base",
            str(tmp_path / "build"),
            "bdist_wheel",
            "--dist-dir",
            str(tmp_path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"layalign"}
    assert len(names) == len(set(names))
    for package, folder in FOLDERS.items():
        for path in source_files(package):
            expected = "/".join((*package.split("."), *path.relative_to(ROOT / folder).parts))
            assert expected in names, expected
    assert any(name.startswith("layalign/bases/") and name.endswith(".safetensors") for name in names)
    assert "layalign/train/recipes/math.yaml" in names
    assert "layalign/train/demo/real/trained/model.safetensors" in names
