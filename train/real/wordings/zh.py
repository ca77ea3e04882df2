from dataclasses import replace

from layalign.train.demo.templates.zh import WORDING as DEMO
from layalign.train.demo.wording import forms
from layalign.train.real.mixed import extended


def before_classifier(words: str, number: int, forms: dict[str, str]) -> str:
    """Two in words is 两 before a classifier."""
    return "两" if words == "二" else words


WORDING = extended(
    replace(DEMO, agree=before_classifier),
    names=forms("name", "安娜\n杰克\n萨拉\n大卫\n艾玛\n彼得\n妮娜\n阿里"),
    nouns=forms("noun", "本书\n本笔记本\n个气球\n个杯子"),
    openings=(
        "一开始{name}有{count}。",
        "今天{name}带来了{count}。",
        "桌子上{name}有{count}。",
        "{name}的包里有{count}。",
    ),
    gains=(
        "{name}在市场又买了{count}。",
        "老师又给了{name}{count}。",
        "晚上{name}得到了{count}。",
        "{name}又赢了{count}。",
    ),
    losses=(
        "然后{name}扔掉了{count}。",
        "{name}给了老师{count}。",
        "晚上{name}在市场卖了{count}。",
        "小偷从{name}那里偷走了{count}。",
    ),
    questions=(
        "最后{name}有{how_many}？",
        "现在有{how_many}？",
        "请说出之后{name}有{how_many}。",
        "那么今天{name}有{how_many}？",
    ),
)
