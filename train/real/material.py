"""What the real run trains on: generated word problems, and Tatoeba exports where the user has them."""

from layalign.train.real import problems
from layalign.train.recipe import DataSource
from layalign.train.sources import read_sources

GENERATED = 8000
REAL_PER_LANGUAGE = 3000
PAIR_FOLDERS = ("tatoeba_pairs", "pairs")
TATOEBA_CODES = {
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


def translation_records(seed, data=None):
    """Records of the translation stage: generated problems, and sentences of the pair files in `data`, if any."""
    return problems.translation_records(GENERATED, seed) + real_pairs(data)


def task_records(seed):
    """Records of the task stage: a generated problem in any language and its worked answer."""
    return problems.task_records(GENERATED, seed)


def pair_files(data):
    """{path: language code} of the Tatoeba exports `XXX-eng.txt` in the pair folders of `data`.

    Raises:
        ValueError: a file whose name begins with no language known here.
    """
    found = {}
    for folder in PAIR_FOLDERS if data is not None else ():
        for path in sorted((data / folder).glob("*-eng.txt")):
            code = path.name.split("-")[0]
            if code not in TATOEBA_CODES:
                raise ValueError(f"{path}: no language known for {code!r}; known: {', '.join(TATOEBA_CODES)}")
            found[path] = TATOEBA_CODES[code]
    return found


def real_pairs(data):
    """Records of the pair files: lines of English, a tab, the other language, and perhaps an attribution."""
    records = []
    for path, language in pair_files(data).items():
        with open(path, encoding="utf-8") as file:
            width = file.readline().count("\t") + 1
        columns = ["target", "source", "attribution"][:width]
        found, _ = read_sources([DataSource(format="tsv", path=str(path), columns=columns, lang=language)])
        # The exports are sorted by length; every so many lines give sentences of all lengths.
        records += found[:: -(-len(found) // REAL_PER_LANGUAGE)]
    return records
