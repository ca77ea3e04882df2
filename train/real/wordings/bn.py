from layalign.train.demo.templates.bn import WORDING as DEMO
from layalign.train.demo.wording import forms
from layalign.train.real.mixed import extended

WORDING = extended(
    DEMO,
    names=forms(
        "name, genitive",
        """
        আনা, আনার
        জ্যাক, জ্যাকের
        সারা, সারার
        ডেভিড, ডেভিডের
        এমা, এমার
        পিটার, পিটারের
        নিনা, নিনার
        আলী, আলীর
        """,
    ),
    nouns=forms("noun", "বই\nখাতা\nবেলুন\nগ্লাস"),
    openings=(
        "শুরুতে {genitive} কাছে {count} আছে।",
        "আজ {name} {count} নিয়ে আসে।",
        "টেবিলে {genitive} {count} আছে।",
        "{genitive} ব্যাগে {count} আছে।",
    ),
    gains=(
        "{name} বাজার থেকে আরও {count} কেনে।",
        "শিক্ষক {name}কে আরও {count} দেন।",
        "সন্ধ্যায় {name} {count} পায়।",
        "{name} আরও {count} জেতে।",
    ),
    losses=(
        "তারপর {name} {count} ফেলে দেয়।",
        "{name} শিক্ষককে {count} দেয়।",
        "সন্ধ্যায় {name} বাজারে {count} বিক্রি করে।",
        "এক চোর {genitive} {count} চুরি করে।",
    ),
    questions=(
        "শেষে {genitive} কাছে {how_many} আছে?",
        "এখন {how_many} আছে?",
        "এরপর {genitive} কাছে {how_many} আছে তা বলো।",
        "তাহলে আজ {genitive} কাছে {how_many} আছে?",
    ),
)
