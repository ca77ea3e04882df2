from layalign.train.demo.wording import Wording, forms

WORDING = Wording(
    code="de",
    names=forms("name", "Asha\nJuma\nMaria\nTom\nLina\nOmar\nMei\nRavi"),
    nouns=forms("noun", "Stifte\nBleistifte\nBananen\nZitronen\nBriefmarken\nTeller\nPerlen\nBilder\nHüte\nTrommeln"),
    containers=forms(
        "boxes_noun, each_box, in_each, into_each",
        """
        Kisten, jede Kiste, jeder Kiste, jede Kiste
        Taschen, jede Tasche, jeder Tasche, jede Tasche
        Körbe, jeder Korb, jedem Korb, jeden Korb
        Pakete, jedes Paket, jedem Paket, jedes Paket
        """,
    ),
    count_pattern="{number} {noun}",
    boxes_pattern="{number} {boxes_noun}",
    how_many_pattern="wie viele {noun}",
    openings=(
        "{name} hat {count}.",
        "Heute Morgen hatte {name} {count}.",
        "Im Haus von {name} gibt es {count}.",
    ),
    groups=(
        "{name} hat {boxes} und {each_box} enthält {count}.",
        "{name} kauft {boxes}. In {in_each} sind {count}.",
        "{name} bereitet {boxes} vor und legt in {into_each} {count}.",
    ),
    gains=(
        "Dann kauft {name} {count}.",
        "Ein Freund gibt {name} {count}.",
        "Später findet {name} {count}.",
    ),
    losses=(
        "{name} verkauft {count}.",
        "{name} gibt einem Freund {count}.",
        "Unterwegs verliert {name} {count}.",
    ),
    questions=(
        "{how_many} hat {name} jetzt?",
        "{how_many} sind es am Ende?",
        "Finde heraus, {how_many} {name} insgesamt hat.",
    ),
)
