from layalign.train.demo.wording import Wording, forms

WORDING = Wording(
    code="en",
    names=forms("name", "Asha\nJuma\nMaria\nTom\nLina\nOmar\nMei\nRavi"),
    nouns=forms("noun", "pens\npencils\nbananas\nlemons\nstamps\nplates\nbeads\npictures\nhats\ndrums"),
    containers=forms(
        "boxes_noun, box",
        """
        boxes, box
        bags, bag
        baskets, basket
        packets, packet
        """,
    ),
    count_pattern="{number} {noun}",
    boxes_pattern="{number} {boxes_noun}",
    how_many_pattern="how many {noun}",
    openings=(
        "{name} has {count}.",
        "This morning {name} had {count}.",
        "In the house of {name} there are {count}.",
    ),
    groups=(
        "{name} has {boxes} and each {box} holds {count}.",
        "{name} buys {boxes}. There are {count} in each {box}.",
        "{name} prepares {boxes} and puts {count} in each {box}.",
    ),
    gains=(
        "Then {name} buys {count}.",
        "A friend gives {name} {count}.",
        "Later {name} finds {count}.",
    ),
    losses=(
        "{name} sells {count}.",
        "{name} gives {count} to a friend.",
        "On the way {name} loses {count}.",
    ),
    questions=(
        "{how_many} does {name} have now?",
        "{how_many} are there in the end?",
        "Find out {how_many} {name} has in total.",
    ),
)
