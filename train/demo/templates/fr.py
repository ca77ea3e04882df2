from layalign.train.demo.wording import Wording, forms


def before_noun(words: str, number: int, forms: dict[str, str]) -> str:
    """vingt-et-un -> vingt-et-une before a feminine noun (quatre-vingt-un -> quatre-vingt-une too)."""
    return words + "e" if words.endswith("un") and forms["gender"] == "f" else words


WORDING = Wording(
    code="fr",
    names=forms("name", "Asha\nJuma\nMaria\nTom\nLina\nOmar\nMei\nRavi"),
    nouns=forms(
        "noun, gender",
        """
        stylos, m
        crayons, m
        bananes, f
        citrons, m
        timbres, m
        plats, m
        perles, f
        tableaux, m
        chapeaux, m
        tambours, m
        """,
    ),
    containers=forms(
        "boxes_noun, box, gender",
        """
        boîtes, boîte, f
        sacs, sac, m
        paniers, panier, m
        paquets, paquet, m
        """,
    ),
    count_pattern="{number} {noun}",
    boxes_pattern="{number} {boxes_noun}",
    how_many_pattern="combien de {noun}",
    agree=before_noun,
    openings=(
        "{name} a {count}.",
        "Ce matin {name} avait {count}.",
        "Chez {name} il y a {count}.",
    ),
    groups=(
        "{name} a {boxes} et chaque {box} contient {count}.",
        "{name} achète {boxes}. Il y a {count} dans chaque {box}.",
        "{name} prépare {boxes} et met {count} dans chaque {box}.",
    ),
    gains=(
        "Puis {name} achète {count}.",
        "Un ami donne {count} à {name}.",
        "Plus tard {name} trouve {count}.",
    ),
    losses=(
        "{name} vend {count}.",
        "{name} donne {count} à un ami.",
        "En chemin {name} perd {count}.",
    ),
    questions=(
        "{how_many} a {name} maintenant ?",
        "{how_many} y a-t-il à la fin ?",
        "Trouve {how_many} {name} a en tout.",
    ),
)
