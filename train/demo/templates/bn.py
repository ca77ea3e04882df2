from layalign.train.demo.wording import Wording, forms

WORDING = Wording(
    code="bn",
    names=forms(
        "name, genitive",
        """
        আশা, আশার
        জুমা, জুমার
        মারিয়া, মারিয়ার
        টম, টমের
        লিনা, লিনার
        ওমর, ওমরের
        মেই, মেইয়ের
        রবি, রবির
        """,
    ),
    nouns=forms("noun", "কলম\nপেন্সিল\nকলা\nলেবু\nডাকটিকিট\nথালা\nপুঁতি\nছবি\nটুপি\nঢোল"),
    containers=forms(
        "box, in_box",
        """
        বাক্স, বাক্সে
        থলে, থলেতে
        ঝুড়ি, ঝুড়িতে
        প্যাকেট, প্যাকেটে
        """,
    ),
    count_pattern="{number}টি {noun}",
    boxes_pattern="{number}টি {box}",
    how_many_pattern="কতটি {noun}",
    openings=(
        "{genitive} কাছে {count} আছে।",
        "আজ সকালে {genitive} কাছে {count} ছিল।",
        "{genitive} বাড়িতে {count} আছে।",
    ),
    groups=(
        "{genitive} কাছে {boxes} আছে এবং প্রতিটি {in_box} {count} আছে।",
        "{name} {boxes} কেনে। প্রতিটি {in_box} {count} আছে।",
        "{name} {boxes} প্রস্তুত করে এবং প্রতিটি {in_box} {count} রাখে।",
    ),
    gains=(
        "তারপর {name} {count} কেনে।",
        "এক বন্ধু {name}কে {count} দেয়।",
        "পরে {name} {count} খুঁজে পায়।",
    ),
    losses=(
        "{name} {count} বিক্রি করে।",
        "{name} এক বন্ধুকে {count} দেয়।",
        "পথে {name} {count} হারায়।",
    ),
    questions=(
        "এখন {genitive} কাছে {how_many} আছে?",
        "শেষে {how_many} আছে?",
        "{genitive} কাছে মোট {how_many} আছে তা বের করো।",
    ),
)
