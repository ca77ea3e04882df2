from layalign.train.demo.templates.de import WORDING as DEMO
from layalign.train.demo.wording import forms
from layalign.train.real.mixed import extended

WORDING = extended(
    DEMO,
    names=forms("name", "Anna\nJack\nSara\nDavid\nEmma\nPeter\nNina\nAli"),
    nouns=forms("noun", "Bücher\nHefte\nLuftballons\nGläser"),
    openings=(
        "Zuerst hat {name} {count}.",
        "Heute bringt {name} {count} mit.",
        "Auf dem Tisch hat {name} {count}.",
        "{name} hat {count} in der Tasche.",
    ),
    gains=(
        "{name} kauft auf dem Markt noch {count}.",
        "Die Lehrerin gibt {name} noch {count}.",
        "Am Abend bekommt {name} {count}.",
        "{name} gewinnt noch {count} dazu.",
    ),
    losses=(
        "Dann wirft {name} {count} weg.",
        "{name} gibt der Lehrerin {count}.",
        "Am Abend verkauft {name} {count} auf dem Markt.",
        "Ein Dieb stiehlt {name} {count}.",
    ),
    questions=(
        "{how_many} hat {name} am Ende?",
        "{how_many} gibt es jetzt?",
        "Sag, {how_many} {name} danach hat.",
        "{how_many} hat {name} also heute?",
    ),
)
