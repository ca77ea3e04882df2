from layalign.train.demo.wording import forms
from layalign.train.real.mixed import MixedWording

WORDING = MixedWording(
    code="ja",
    names=forms(
        "name",
        "アーシャ\nジュマ\nマリア\nトム\nリナ\nオマール\nメイ\nラヴィ\n"
        "アンナ\nジャック\nサラ\nデイビッド\nエマ\nピーター\nニナ\nアリ",
    ),
    nouns=forms(
        "noun, unit",
        """
        ペン, 本
        鉛筆, 本
        バナナ, 本
        レモン, 個
        切手, 枚
        皿, 枚
        ビーズ, 個
        絵, 枚
        帽子, 個
        太鼓, 個
        本, 冊
        ノート, 冊
        風船, 個
        グラス, 個
        """,
    ),
    containers=({},),
    count_pattern="{number}{unit}",
    boxes_pattern="{number}",
    how_many_pattern="何{unit}",
    space="",
    groups=(),
    openings=(
        "{name}は{noun}を{count}持っています。",
        "今朝、{name}は{noun}を{count}持っていました。",
        "{name}の家に{noun}が{count}あります。",
        "最初、{name}は{noun}を{count}持っています。",
        "今日、{name}は{noun}を{count}持ってきます。",
        "机の上に{name}の{noun}が{count}あります。",
        "{name}のかばんの中に{noun}が{count}あります。",
    ),
    gains=(
        "それから{name}は{noun}を{count}買います。",
        "友達が{name}に{noun}を{count}あげます。",
        "その後、{name}は{noun}を{count}見つけます。",
        "{name}は市場で{noun}をさらに{count}買います。",
        "先生が{name}に{noun}をさらに{count}あげます。",
        "夕方、{name}は{noun}を{count}もらいます。",
        "{name}は{noun}をさらに{count}勝ち取ります。",
    ),
    losses=(
        "{name}は{noun}を{count}売ります。",
        "{name}は友達に{noun}を{count}あげます。",
        "途中で{name}は{noun}を{count}なくします。",
        "それから{name}は{noun}を{count}捨てます。",
        "{name}は先生に{noun}を{count}あげます。",
        "夕方、{name}は市場で{noun}を{count}売ります。",
        "泥棒が{name}から{noun}を{count}盗みます。",
    ),
    questions=(
        "{name}は今、{noun}を{how_many}持っていますか？",
        "最後に{noun}は{how_many}ありますか？",
        "{name}が全部で{noun}を{how_many}持っているか求めてください。",
        "最後に{name}は{noun}を{how_many}持っていますか？",
        "今、{noun}は{how_many}ありますか？",
        "その後{name}が{noun}を{how_many}持っているか言ってください。",
        "では、今日{name}は{noun}を{how_many}持っていますか？",
    ),
)
