from layalign.train.demo.templates.fr import WORDING as DEMO
from layalign.train.demo.wording import forms
from layalign.train.real.mixed import extended

WORDING = extended(
    DEMO,
    names=forms("name", "Anna\nJack\nSara\nDavid\nEmma\nPeter\nNina\nAli"),
    nouns=forms("noun, gender", "livres, m\ncahiers, m\nballons, m\nverres, m"),
    openings=(
        "Au début {name} a {count}.",
        "Aujourd'hui {name} apporte {count}.",
        "Sur la table {name} a {count}.",
        "{name} a {count} dans son sac.",
    ),
    gains=(
        "{name} achète encore {count} au marché.",
        "La maîtresse donne encore {count} à {name}.",
        "Le soir {name} reçoit {count}.",
        "{name} gagne encore {count}.",
    ),
    losses=(
        "Ensuite {name} jette {count}.",
        "{name} donne {count} à la maîtresse.",
        "Le soir {name} vend {count} au marché.",
        "Un voleur vole {count} à {name}.",
    ),
    questions=(
        "{how_many} a {name} à la fin ?",
        "{how_many} y a-t-il maintenant ?",
        "Dis {how_many} {name} a après cela.",
        "Alors {how_many} a {name} aujourd'hui ?",
    ),
)
