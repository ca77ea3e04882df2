"""What `layalign`, `layalign.kernels` and `layalign.train` export on first use, whatever was imported before."""

import importlib
import pickle
import subprocess
import sys

import pytest

OPERATORS = ("layer_mix", "stream_linear", "cross_key_values", "fold_key_values")
PAGED = "adaptive_fusion_decode_paged"
KERNELS = [*OPERATORS, PAGED, *(f"{name}_reference" for name in (*OPERATORS, PAGED, "adaptive_fusion_attention"))]
TRAIN = ["train", "load_recipe", "Recipe", "StageRecipe", "DataSource"]


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("package", "names"), [("layalign.kernels", KERNELS), ("layalign.train", TRAIN)])
def test_exports_of_a_folder_without_init(package, names):
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(names)
    assert set(names) <= set(dir(module))
    for name in names:
        assert callable(getattr(module, name)), name
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec(f"from {package} import nothing")
    run(f"from {package} import *\nassert {names[0]} and {names[-1]}")


IMPORTS = [
    "from layalign.train import train, Recipe; assert callable(train)",
    "from layalign.train import recipe; assert recipe.__name__ == 'layalign.train.recipe'",
    "import layalign.train.stages as stages; assert stages.__name__ == 'layalign.train.stages' and stages.train",
]


@pytest.mark.parametrize("lines", [IMPORTS, IMPORTS[::-1]], ids=["names first", "modules first"])
def test_exports_shadow_no_module_in_any_order(lines):
    run("\n".join(lines))


def test_the_attentions_folder_is_not_shadowed():
    """`layalign.kernels.adaptive_fusion_attention` is the operator's folder; `layalign.adaptive_fusion_attention` the operator."""
    run(
        "from layalign.kernels import adaptive_fusion_attention_reference, layer_mix\n"
        "import layalign.kernels.adaptive_fusion_attention as folder\n"
        "from layalign import adaptive_fusion_attention\n"
        "assert folder.adaptive_fusion_attention is adaptive_fusion_attention"
    )


def test_folders_are_exported_without_loading_anything():
    run(
        "import sys, layalign.kernels, layalign.train\n"
        "dir(layalign.kernels), dir(layalign.train)\n"
        "assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules)"
    )


def test_what_is_exported_can_be_pickled():
    from layalign.train import DataSource, train

    source = DataSource(format="jsonl", path="a.jsonl")
    assert pickle.loads(pickle.dumps(source)) == source
    assert pickle.loads(pickle.dumps(train)) is train
    assert train.__module__ == "layalign.train.stages"
