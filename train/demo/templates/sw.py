from layalign.train.demo.wording import Wording, forms

AGREEING = {2: "wili", 3: "tatu", 4: "nne", 5: "tano", 8: "nane"}


def noun_class(words: str, number: int, forms: dict[str, str]) -> str:
    """Two, three, four, five and eight take the prefix of the noun's class; class 10 has none (every counted noun)."""
    prefix = forms.get("prefix")
    return prefix + AGREEING[number] if prefix and number in AGREEING else words


WORDING = Wording(
    code="sw",
    names=forms("name", "Asha\nJuma\nMaria\nTom\nLina\nOmar\nMei\nRavi"),
    nouns=forms("noun", "kalamu\npenseli\nndizi\nndimu\nstempu\nsahani\nshanga\npicha\nkofia\nngoma"),
    containers=forms(
        "boxes_noun, box, holds, prefix",
        """
        masanduku, sanduku, lina, ma
        mifuko, mfuko, una, mi
        vikapu, kikapu, kina, vi
        pakiti, pakiti, ina,
        """,
    ),
    count_pattern="{noun} {number}",
    boxes_pattern="{boxes_noun} {number}",
    how_many_pattern="{noun} ngapi",
    agree=noun_class,
    openings=(
        "{name} ana {count}.",
        "Leo asubuhi {name} alikuwa na {count}.",
        "Nyumbani kwa {name} kuna {count}.",
    ),
    groups=(
        "{name} ana {boxes} na kila {box} {holds} {count}.",
        "{name} ananunua {boxes}. Kuna {count} katika kila {box}.",
        "{name} anaandaa {boxes} na kuweka {count} katika kila {box}.",
    ),
    gains=(
        "Kisha {name} ananunua {count}.",
        "Rafiki anampa {name} {count}.",
        "Baadaye {name} anapata {count}.",
    ),
    losses=(
        "{name} anauza {count}.",
        "{name} anampa rafiki {count}.",
        "Njiani {name} anapoteza {count}.",
    ),
    questions=(
        "{name} ana {how_many} sasa?",
        "Mwishoni kuna {how_many}?",
        "Tafuta {name} ana jumla ya {how_many}.",
    ),
)
