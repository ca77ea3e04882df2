from layalign.train.demo.wording import Wording, forms


def before_masculine_noun(words: str, number: int, forms: dict[str, str]) -> str:
    """veintiuno libros -> veintiún libros, treinta y uno -> treinta y un; every noun here is masculine."""
    if words.endswith("veintiuno"):
        return words.removesuffix("uno") + "ún"
    return words.removesuffix("o") if words.endswith("uno") else words


WORDING = Wording(
    code="es",
    names=forms("name", "Asha\nJuma\nMaría\nTom\nLina\nOmar\nMei\nRavi"),
    nouns=forms(
        "noun",
        "bolígrafos\nlápices\nplátanos\nlimones\nsellos\nplatos\nabalorios\ncuadros\nsombreros\ntambores",
    ),
    containers=forms(
        "boxes_noun, box",
        """
        cajas, caja
        bolsas, bolsa
        cestas, cesta
        paquetes, paquete
        """,
    ),
    count_pattern="{number} {noun}",
    boxes_pattern="{number} {boxes_noun}",
    how_many_pattern="cuántos {noun}",
    agree=before_masculine_noun,
    openings=(
        "{name} tiene {count}.",
        "Esta mañana {name} tenía {count}.",
        "En la casa de {name} hay {count}.",
    ),
    groups=(
        "{name} tiene {boxes} y cada {box} contiene {count}.",
        "{name} compra {boxes}. Hay {count} en cada {box}.",
        "{name} prepara {boxes} y pone {count} en cada {box}.",
    ),
    gains=(
        "Luego {name} compra {count}.",
        "Un amigo le da {count} a {name}.",
        "Más tarde {name} encuentra {count}.",
    ),
    losses=(
        "{name} vende {count}.",
        "{name} le da {count} a un amigo.",
        "En el camino {name} pierde {count}.",
    ),
    questions=(
        "¿Cuántos {noun} tiene {name} ahora?",
        "¿Cuántos {noun} hay al final?",
        "Averigua {how_many} tiene {name} en total.",
    ),
)
