"""Hook of mkdocs: pages and pictures of the site that live elsewhere in the tree, so that each has one source, and the sources
of the API as they are installed."""

import shutil
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Of the experiments with real models.
REPORTS = {
    "real_pair": ROOT / "train" / "demo" / "real" / "report",
    "second_experiment": ROOT / "train" / "demo" / "real" / "further_report",
    "shipped_part": ROOT / "train" / "demo" / "real" / "last_report",
    "real_pair_tables": ROOT / "train" / "demo" / "real" / "tables_report",
}
# Of folders of results; what other pages are there are parts of one of these.
PAGE_NAMES = ("README.md", "results.md", "serving.md")
INSTALLED = ROOT / "runs" / "site_sources"  # mkdocs.yml names it
PAGES = {
    "changelog.md": ROOT / "CHANGELOG.md",
    "contributing.md": ROOT / "CONTRIBUTING.md",
    "real_pair/log.md": ROOT / "train" / "LOG.md",
    "tuning.md": ROOT / "bench" / "TUNING.md",
}


def sources() -> dict[str, Path]:
    """Place in the site -> file of the tree."""
    found = dict(PAGES)
    for name, folder in (REPORTS | {f"machines/{folder.name}": folder for folder in machines()}).items():
        shown = [path for path in sorted(folder.iterdir()) if path.suffix == ".png" or path.name in PAGE_NAMES]
        found |= {f"{name}/{path.name}": path for path in shown}
    return found


def machines() -> list[Path]:
    """Folders with recorded benchmarks, one a kind of machine."""
    return sorted(path.parent for path in (ROOT / "bench" / "results").glob("*/results.md"))


def on_startup(**_: object) -> None:
    """The package without links, which the reader of docstrings does not follow."""
    shutil.rmtree(INSTALLED, ignore_errors=True)
    for folder, place in (("layalign", "layalign"), ("kernels", "layalign/kernels"), ("train", "layalign/train")):
        for path in (ROOT / folder).rglob("*.py"):
            copy = INSTALLED / place / path.relative_to(ROOT / folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        (INSTALLED / place / "__init__.py").touch()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """A page for each machine with recorded benchmarks."""
    results = next(section["Results"] for section in config.nav if "Results" in section)
    results += [{f"Benchmarks on {folder.name}": f"machines/{folder.name}/results.md"} for folder in machines()]
    served = [folder for folder in machines() if (folder / "serving.md").exists()]
    results += [{f"Serving on {folder.name}": f"machines/{folder.name}/serving.md"} for folder in served]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The site's own files and those from elsewhere."""
    for place, path in sources().items():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files
