from layalign.train.demo.templates.en import WORDING as DEMO
from layalign.train.demo.wording import forms
from layalign.train.real.mixed import extended

WORDING = extended(
    DEMO,
    names=forms("name", "Anna\nJack\nSara\nDavid\nEmma\nPeter\nNina\nAli"),
    nouns=forms("noun", "books\nnotebooks\nballoons\nglasses"),
    openings=(
        "At first {name} has {count}.",
        "Today {name} brings {count}.",
        "On the table {name} has {count}.",
        "{name} has {count} in the bag.",
    ),
    gains=(
        "{name} buys {count} more at the market.",
        "The teacher gives {name} {count} more.",
        "In the evening {name} gets {count}.",
        "{name} wins {count} more.",
    ),
    losses=(
        "Then {name} throws away {count}.",
        "{name} gives the teacher {count}.",
        "In the evening {name} sells {count} at the market.",
        "A thief steals {count} from {name}.",
    ),
    questions=(
        "{how_many} does {name} have in the end?",
        "{how_many} are there now?",
        "Say {how_many} {name} has after that.",
        "So {how_many} does {name} have today?",
    ),
)
