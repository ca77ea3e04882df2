"""The layout: names we do not claim, one-way imports, a light `import layalign`, public functions typed and documented."""

import ast
import os
import subprocess
import sys
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
# What the extras bring: the core imports it inside the function that needs it, the trainer its own at the top of a file.
OPTIONAL = {"accelerate", "datasets", "gguf", "matplotlib", "num2words2", "rich", "sacrebleu", "yaml"}
OPTIONAL |= {"bitsandbytes", "peft", "torchao", "vllm", "gradio"}
TRAINER_MAY_IMPORT = {"accelerate", "datasets", "yaml"}
FORBIDDEN = {"layalign.kernels": {"transformers", "datasets", "accelerate", "safetensors"}}


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


def imported_at_once(path):
    """(line, first name) of the imports that importing a file runs: not those of function bodies and for types alone."""
    nodes = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module.split(".")[0]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            nodes += ast.iter_child_nodes(node)


@pytest.mark.parametrize("package", FOLDERS)
def test_what_the_extras_bring_is_imported_when_needed(package):
    allowed = TRAINER_MAY_IMPORT if package == "layalign.train" else set()
    wrong = []
    # vLLM alone imports the modules that begin with it, by their names.
    of_vllm = {ROOT / "layalign/serving" / f"{name}.py" for name in ("attention", "model", "processing", "requests")}
    for path in source_files(package):
        # The demonstration is an extra of its own.
        if ROOT / "train" / "demo" not in path.parents and path not in of_vllm:
            found = [(line, name) for line, name in imported_at_once(path) if name in OPTIONAL - allowed]
            wrong += [f"{path.relative_to(ROOT)}:{line} imports {name}" for line, name in found]
    assert not wrong, "\n".join(wrong)


def test_references_and_fast_backends_do_not_import_each_other():
    for operator in ("adaptive_fusion_attention", "layerwise_aligner"):
        folder = ROOT / "kernels" / operator
        files = sorted(folder.rglob("*.py"))
        assert len(files) > 10
        for path in files:
            parts = {part for _, module in imported(path) for part in module.split(".")}
            if path.name == "reference.py":
                assert not parts & {"torch_backend", "gpu", "triton"}
            elif path != folder / "__init__.py":
                assert "reference" not in parts, f"{path.relative_to(folder)} of {operator} imports the reference"


def test_no_package_of_ours_is_called_kernels_or_train():
    for name in ("kernels", "train"):
        assert not (ROOT / name / "__init__.py").exists()
        assert (ROOT / "layalign" / name).is_symlink()
        assert os.readlink(ROOT / "layalign" / name) == f"../{name}"
    names = {path.stem for path in ROOT.rglob("*.py") if not path.relative_to(ROOT).parts[0].startswith(".venv")}
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


# What a user imports or a program calls: typed and documented. The files of an operator below its public functions are not.
PUBLIC = (
    "layalign/**/*.py",
    "train/*.py",
    "kernels/*/__init__.py",
    "kernels/autotuning.py",
    "kernels/dispatch.py",
    "kernels/files.py",
)


def public_files():
    """The files of PUBLIC, each once, without what lies behind the links."""
    found = {path for pattern in PUBLIC for path in ROOT.glob(pattern)}
    behind = (ROOT / "layalign" / "kernels", ROOT / "layalign" / "train")
    return sorted(path for path in found if not any(link in path.parents for link in behind))


def public_definitions(body, prefix=""):
    """(name, node) of the public classes, functions and methods of a module; what a function defines inside is not."""
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            dunder = node.name.startswith("__") and node.name.endswith("__")
            if not node.name.startswith("_") or (prefix and dunder):
                yield prefix + node.name, node
                if isinstance(node, ast.ClassDef):
                    yield from public_definitions(node.body, f"{prefix}{node.name}.")


def lacking(name, node):
    """What a public definition lacks, in words. A method with two underscores needs types, and no docstring."""
    if not name.split(".")[-1].startswith("__") and ast.get_docstring(node) is None:
        yield "a docstring"
    if isinstance(node, ast.ClassDef):
        return
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    static = any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in node.decorator_list)
    if "." in name and not static:
        named = named[1:]
    named += [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    if untyped := [argument.arg for argument in named if argument.annotation is None]:
        yield f"types of {', '.join(untyped)}"
    if node.returns is None and node.name != "__init__":
        yield "the type of what it returns"


def test_public_functions_are_typed_and_documented():
    files = public_files()
    assert len(files) > 20
    wrong = []
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name, node in public_definitions(tree.body):
            where = f"{path.relative_to(ROOT)}:{node.lineno} {name}"
            wrong += [f"{where} lacks {what}" for what in lacking(name, node)]
    assert not wrong, f"{len(wrong)} places:\n" + "\n".join(wrong)


def test_no_file_is_over_400_lines():
    """Of code: what is longer has two subjects."""
    roots = [*FOLDERS.values(), "bench", "tests", "examples", "docs"]
    files = {path.resolve() for root in roots for path in (ROOT / root).rglob("*.py")} | {ROOT / "setup.py"}
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    long = [f"{path.relative_to(ROOT)}: {lines}" for path, lines in sorted(lengths.items()) if lines > 400]
    assert not long, "\n".join(long)
