from layalign.train.demo.wording import Wording, forms


def before_classifier(words: str, number: int, forms: dict[str, str]) -> str:
    """Two is 两 before a classifier; 十二 and 二十 stay."""
    return "两" if number == 2 else words


WORDING = Wording(
    code="zh",
    names=forms("name", "阿莎\n朱马\n玛丽亚\n汤姆\n丽娜\n奥马尔\n小梅\n拉维"),
    nouns=forms("noun", "支钢笔\n支铅笔\n根香蕉\n个柠檬\n张邮票\n个盘子\n颗珠子\n幅画\n顶帽子\n面鼓"),
    containers=forms("box", "盒子\n袋子\n篮子\n包裹"),
    count_pattern="{number}{noun}",
    boxes_pattern="{number}个{box}",
    how_many_pattern="多少{noun}",
    agree=before_classifier,
    space="",
    openings=(
        "{name}有{count}。",
        "今天早上{name}有{count}。",
        "{name}的家里有{count}。",
    ),
    groups=(
        "{name}有{boxes}，每个{box}装着{count}。",
        "{name}买了{boxes}。每个{box}里有{count}。",
        "{name}准备了{boxes}，在每个{box}里放{count}。",
    ),
    gains=(
        "然后{name}买了{count}。",
        "一个朋友给了{name}{count}。",
        "后来{name}找到了{count}。",
    ),
    losses=(
        "{name}卖了{count}。",
        "{name}给了朋友{count}。",
        "路上{name}丢了{count}。",
    ),
    questions=(
        "{name}现在有{how_many}？",
        "最后有{how_many}？",
        "请算出{name}一共有{how_many}。",
    ),
)
