from layalign.train.demo.templates.es import WORDING as DEMO
from layalign.train.demo.wording import forms
from layalign.train.real.mixed import extended

WORDING = extended(
    DEMO,
    names=forms("name", "Anna\nJack\nSara\nDavid\nEmma\nPeter\nNina\nAli"),
    # Masculine like the demo's, for cuántos.
    nouns=forms("noun", "libros\ncuadernos\nglobos\nvasos"),
    openings=(
        "Al principio {name} tiene {count}.",
        "Hoy {name} trae {count}.",
        "Sobre la mesa {name} tiene {count}.",
        "{name} tiene {count} en la bolsa.",
    ),
    gains=(
        "{name} compra {count} más en el mercado.",
        "La maestra le da {count} más a {name}.",
        "Por la noche {name} recibe {count}.",
        "{name} gana {count} más.",
    ),
    losses=(
        "Luego {name} tira {count} a la basura.",
        "{name} le da {count} a la maestra.",
        "Por la noche {name} vende {count} en el mercado.",
        "Un ladrón le roba {count} a {name}.",
    ),
    questions=(
        "¿Cuántos {noun} tiene {name} al final?",
        "¿Cuántos {noun} hay ahora?",
        "Di {how_many} tiene {name} después de eso.",
        "Entonces, ¿{how_many} tiene {name} hoy?",
    ),
)
