"""Sentence pairs with English of Tatoeba: the exports that a user has, to train on, and LASER's test set."""

from __future__ import annotations

from pathlib import Path

from layalign.train.data.data_source import DataSource
from layalign.train.data.sources import read_sources

PER_LANGUAGE = 3000
LICENCE = {"Tatoeba": "CC BY 2.0 FR"}
CODES = {
    "ben": "bn",
    "cmn": "zh",
    "deu": "de",
    "fra": "fr",
    "jpn": "ja",
    "rus": "ru",
    "spa": "es",
    "swa": "sw",
    "swh": "sw",
    "tel": "te",
    "tha": "th",
}


def training_pairs(data: Path | None, most: int = PER_LANGUAGE) -> list[dict]:
    """Records of the exports `tatoeba_pairs/XXX-eng.txt` in `data`, at most so many a language; none without `data`.

    A line is English, a tab, the other language, and perhaps an attribution.

    Raises:
        ValueError: a file whose name begins with no language known here.
    """
    records = []
    for path in sorted((data / "tatoeba_pairs").glob("*-eng.txt")) if data is not None else ():
        code = path.name.split("-")[0]
        if code not in CODES:
            raise ValueError(f"{path}: no language known for {code!r}; known: {', '.join(CODES)}")
        with open(path, encoding="utf-8") as file:
            width = file.readline().count("\t") + 1
        columns = ["target", "source", "attribution"][:width]
        found, _ = read_sources([DataSource(format="tsv", path=str(path), columns=columns, lang=CODES[code])])
        # The exports are sorted by length; every so many lines give sentences of all lengths.
        records += found[:: -(-len(found) // most)]
    return records


def laser_pairs(folder: Path, sentences: int) -> dict[str, list[tuple[str, str]]]:
    """{lang: [(sentence, English)]} of LASER's test set, sentences spread over each file."""
    found = {}
    for path in sorted(folder.glob("tatoeba.*-eng.eng")):
        code = path.name.split(".")[1].removesuffix("-eng")
        texts = [
            file.read_text(encoding="utf-8").rstrip("\n").split("\n") for file in (path.with_suffix(f".{code}"), path)
        ]
        pairs = list(zip(*texts, strict=True))
        found[CODES[code]] = pairs[:: max(1, len(pairs) // sentences)][:sentences]
    return found
