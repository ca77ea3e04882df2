from dataclasses import replace

from layalign.train.demo.templates.sw import AGREEING
from layalign.train.demo.templates.sw import WORDING as DEMO
from layalign.train.demo.wording import forms
from layalign.train.real.mixed import extended


def noun_class(words: str, number: int, forms: dict[str, str]) -> str:
    """mbili -> viwili, kumi na mbili -> kumi na viwili where the noun's class has a prefix; digits stay."""
    prefix = forms.get("prefix")
    if not prefix or words.isdigit() or number % 10 not in AGREEING:
        return words
    return ("kumi na " if number > 10 else "") + prefix + AGREEING[number % 10]


# The demo's nouns are all of class 10, which has no prefix.
COUNTED = replace(
    DEMO,
    nouns=tuple(noun | {"prefix": "", "how": "ngapi"} for noun in DEMO.nouns),
    how_many_pattern="{noun} {how}",
    agree=noun_class,
)
WORDING = extended(
    COUNTED,
    names=forms("name", "Anna\nJack\nSara\nDavid\nEmma\nPeter\nNina\nAli"),
    nouns=forms(
        "noun, prefix, how", "vitabu, vi, vingapi\nmadaftari, ma, mangapi\nmaputo, ma, mangapi\nglasi, , ngapi"
    ),
    openings=(
        "Mwanzoni {name} ana {count}.",
        "Leo {name} analeta {count}.",
        "Mezani {name} ana {count}.",
        "{name} ana {count} kwenye mfuko.",
    ),
    gains=(
        "{name} ananunua {count} zaidi sokoni.",
        "Mwalimu anampa {name} {count} zaidi.",
        "Jioni {name} anapokea {count}.",
        "{name} anashinda {count} zaidi.",
    ),
    losses=(
        "Kisha {name} anatupa {count}.",
        "{name} anampa mwalimu {count}.",
        "Jioni {name} anauza {count} sokoni.",
        "Mwizi anamwibia {name} {count}.",
    ),
    questions=(
        "Mwishoni {name} ana {how_many}?",
        "Sasa kuna {how_many}?",
        "Sema {name} ana {how_many} baada ya hapo.",
        "Basi leo {name} ana {how_many}?",
    ),
)
