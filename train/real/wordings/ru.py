from layalign.train.demo.wording import forms
from layalign.train.real.mixed import MixedWording


def counted(words: str, number: int, forms: dict[str, str]) -> str:
    """The numeral with its noun: genitive singular after 2 to 4, plural after 5 to 20; две before a feminine noun."""
    if words == "два" and forms["gender"] == "f":
        words = "две"
    return f"{words} {forms['few'] if number < 5 else forms['noun']}"


WORDING = MixedWording(
    code="ru",
    names=forms(
        "name, genitive, dative",
        """
        Аша, Аши, Аше
        Джума, Джумы, Джуме
        Мария, Марии, Марии
        Том, Тома, Тому
        Лина, Лины, Лине
        Омар, Омара, Омару
        Мэй, Мэй, Мэй
        Рави, Рави, Рави
        Анна, Анны, Анне
        Джек, Джека, Джеку
        Сара, Сары, Саре
        Давид, Давида, Давиду
        Эмма, Эммы, Эмме
        Питер, Питера, Питеру
        Нина, Нины, Нине
        Али, Али, Али
        """,
    ),
    nouns=forms(
        "noun, few, gender",
        """
        ручек, ручки, f
        карандашей, карандаша, m
        бананов, банана, m
        лимонов, лимона, m
        марок, марки, f
        тарелок, тарелки, f
        бусин, бусины, f
        картин, картины, f
        шляп, шляпы, f
        барабанов, барабана, m
        книг, книги, f
        тетрадей, тетради, f
        шариков, шарика, m
        стаканов, стакана, m
        """,
    ),
    containers=({},),
    count_pattern="{number}",
    boxes_pattern="{number}",
    how_many_pattern="сколько {noun}",
    agree=counted,
    groups=(),
    openings=(
        "У {genitive} {count}.",
        "Сегодня утром у {genitive} было {count}.",
        "Дома у {genitive} {count}.",
        "Сначала у {genitive} {count}.",
        "Сегодня {name} приносит {count}.",
        "На столе у {genitive} {count}.",
        "У {genitive} в сумке {count}.",
    ),
    gains=(
        "Затем {name} покупает {count}.",
        "Друг даёт {dative} {count}.",
        "Позже {name} находит {count}.",
        "{name} покупает на рынке ещё {count}.",
        "Учитель даёт {dative} ещё {count}.",
        "Вечером {name} получает {count}.",
        "{name} выигрывает ещё {count}.",
    ),
    losses=(
        "{name} продаёт {count}.",
        "{name} отдаёт другу {count}.",
        "По дороге {name} теряет {count}.",
        "Потом {name} выбрасывает {count}.",
        "{name} отдаёт учителю {count}.",
        "Вечером {name} продаёт {count} на рынке.",
        "Вор крадёт у {genitive} {count}.",
    ),
    questions=(
        "{how_many} теперь у {genitive}?",
        "{how_many} получится в конце?",
        "Найди, {how_many} всего у {genitive}.",
        "{how_many} у {genitive} в конце?",
        "{how_many} есть теперь?",
        "Скажи, {how_many} у {genitive} после этого.",
        "Так {how_many} у {genitive} сегодня?",
    ),
)
