"""What pyproject.toml cannot say: the packages, and the links of the tree in the sdist. `kernels/` and `train/` keep their short
names in the tree and install below `layalign`: the import name `kernels` belongs to another distribution that transformers looks for."""

from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

ROOTS = {"layalign": "layalign", "layalign.kernels": "kernels", "layalign.train": "train"}
LINKS = ("kernels", "train")


def packages() -> list[str]:
    """Every folder below the three roots that holds Python files; the links layalign/kernels and layalign/train are not followed."""
    found = []
    for package, folder in ROOTS.items():
        found.append(package)
        for path in sorted(Path(folder).rglob("__init__.py")):
            parts = path.parent.relative_to(folder).parts
            if parts and not (package == "layalign" and parts[0] in LINKS):
                found.append(".".join((package, *parts)))
    return found


class SdistWithLinks(sdist):
    def make_release_tree(self, base_dir, files):
        """A tree whose tests run: with the links layalign/kernels and layalign/train."""
        super().make_release_tree(base_dir, files)
        for name in LINKS:
            (Path(base_dir) / "layalign" / name).symlink_to(f"../{name}")


setup(packages=packages(), cmdclass={"sdist": SdistWithLinks})
