"""Packages and dependencies. `kernels/` and `train/` keep their short names in the tree and install below `layalign`:
the import name `kernels` belongs to another distribution that transformers looks for."""

from pathlib import Path

from setuptools import setup

ROOTS = {"layalign": "layalign", "layalign.kernels": "kernels", "layalign.train": "train"}


def packages():
    """Every folder below the three roots that holds Python files; the links layalign/kernels and layalign/train are not followed."""
    found = []
    for package, folder in ROOTS.items():
        found.append(package)
        for path in sorted(Path(folder).rglob("__init__.py")):
            parts = path.parent.relative_to(folder).parts
            if parts and not (package == "layalign" and parts[0] in ("kernels", "train")):
                found.append(".".join((package, *parts)))
    return found


TORCH = "torch>=2.11"
CORE = [
    TORCH,
    "triton>=3.6,<3.10; platform_system == 'Linux' and platform_machine in 'x86_64 aarch64'",
    "transformers>=5.17,<5.24",
    "accelerate>=1.10",
    "datasets>=4.0",
    "safetensors>=0.6",
    "tokenizers>=0.21",
    "typer>=0.15",
    "rich>=13",
    "tqdm>=4.66",
    "pyyaml>=6",
    "num2words2>=1.0.20",
    "matplotlib>=3.9",
]
REAL = ["gguf>=0.17", "sacrebleu>=2.4"]
TEST = [
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.12",
    "tensorboard>=2.18",
    *REAL,
]

setup(
    name="layalign",
    version="0.1.0",
    description="Layer-wise adaptive fusion of a multilingual encoder into an LLM: kernels, model, training, evaluation",
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=packages(),
    package_dir=ROOTS,
    package_data={
        "layalign": ["bases/**/*"],
        "layalign.train": ["recipes/*.yaml"],
        "layalign.train.demo": ["sentences/*.json"],
        "layalign.train.demo.real": ["trained/*"],
    },
    install_requires=CORE,
    extras_require={"real": REAL, "test": TEST, "tensorboard": ["tensorboard>=2.18"]},
    entry_points={"console_scripts": ["layalign=layalign.cli:main"]},
)
