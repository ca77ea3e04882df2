"""Small files of the tasks in the layouts that they are published in, written for the tests; and the same rows for `datasets`."""

import json

CHOICES = ["A", "B", "C", "D", "E"]


def csqa(lang, stem, choices, answer, number=0):
    """A row of X-CSQA's own files."""
    labelled = [{"label": letter, "text": choice} for letter, choice in zip(CHOICES, choices, strict=False)]
    return {"id": f"q{number}", "lang": lang, "question": {"stem": stem, "choices": labelled}, "answerKey": answer}


XCSQA = {
    "sw": [
        csqa("sw", "Samaki huishi wapi?", ["jangwani", "majini", "angani", "mtini", "kitabuni"], "B"),
        csqa("sw", "Nani hufundisha?", ["mwalimu", "paka", "meza", "gari", "jua"], "A", 1),
    ],
    "ja": [csqa("jap", "魚はどこにすんでいますか。", ["砂漠", "水の中", "空", "木の上", "本の中"], "B")],
    "en": [csqa("en", "Where do fish live?", ["a desert", "the water", "the sky", "a tree", "a book"], "B")],
}
XNLI = {
    "sw": [("Mvua inanyesha.", "Ni mchana.", "neutral"), ("Paka amelala.", "Paka anakimbia.", "contradiction")],
    "en": [("It is raining.", "It is day.", "neutral"), ("A cat sleeps.", "An animal sleeps.", "entailment")],
}
LABELS = {"entailment": 0, "neutral": 1, "contradiction": 2}
XCOPA = {
    "et": {
        "premise": "Mees avas kraani.",
        "choice1": "Tualett täitus veega.",
        "choice2": "Kraanist hakkas vesi jooksma.",
        "question": "effect",
        "label": 1,
        "idx": 0,
        "changed": False,
    },
    "sw": {
        "premise": "Mwanamume alifungua bomba.",
        "choice1": "Alikuwa na kiu.",
        "choice2": "Alikuwa amelala.",
        "question": "cause",
        "label": 0,
        "idx": 0,
        "changed": True,
    },
}
FLORES = {
    "eng": ["Trains stop here.", "It rained for a week."],
    "swh": ["Treni husimama hapa.", "Ilinyesha kwa wiki moja."],
    "zho_simpl": ["火车在这里停。", "下了一个星期的雨。"],
}
FLORES200 = {"eng": "eng_Latn", "swh": "swh_Latn", "zho_simpl": "zho_Hans"}

# What a task of the tests reads of each of them, by language.
EXPECTED = {
    "xcsqa": {"sw": ["B", "A"], "ja": ["B"], "en": ["B"]},
    "xnli": {"sw": ["neutral", "contradiction"], "en": ["neutral", "entailment"]},
    "xcopa": {"et": ["B"], "sw": ["A"]},
    "flores": {"sw": FLORES["eng"], "zh": FLORES["eng"]},
}


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_rows(path, rows):
    write_lines(path, [json.dumps(row, ensure_ascii=False) for row in rows])


def xcsqa_published(folder):
    for lang, rows in XCSQA.items():
        write_rows(folder / "evaluation" / "x-csqa" / lang / "dev.jsonl", rows)


def xcsqa_original(folder):
    for rows in XCSQA.values():
        code = rows[0]["lang"]
        write_rows(folder / "X-CSR_datasets" / "X-CSQA" / code / "dev.jsonl", rows)
        no_answers = [{name: value for name, value in row.items() if name != "answerKey"} for row in rows]
        write_rows(folder / "X-CSR_datasets" / "X-CSQA" / code / "test.jsonl", no_answers)


def xnli_rows(label="label", name=lambda lang: lang):
    return [
        {"language": name(lang), label: answer, "sentence1": premise, "sentence2": hypothesis}
        for lang, rows in XNLI.items()
        for premise, hypothesis, answer in rows
    ]


def xnli_published(folder):
    path = folder / "evaluation" / "xnli" / "test.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(xnli_rows(name={"sw": "Swahili", "en": "English"}.get), indent=2), encoding="utf-8")


def xnli_jsonl(folder):
    write_rows(folder / "XNLI-1.0" / "xnli.test.jsonl", xnli_rows("gold_label"))


def xnli_tsv(folder):
    names = ["language", "gold_label", "sentence1_binary_parse", "sentence1", "sentence2", "pairID"]
    rows = [{"sentence1_binary_parse": "", "pairID": "7", **row} for row in xnli_rows("gold_label")]
    lines = ["\t".join(row[name] for name in names) for row in rows]
    write_lines(folder / "XNLI-1.0" / "xnli.test.tsv", ["\t".join(names), *lines])


def xcopa_original(folder):
    for lang, row in XCOPA.items():
        write_rows(folder / "data" / lang / f"test.{lang}.jsonl", [row])
        write_rows(folder / "data" / lang / f"val.{lang}.jsonl", [row | {"label": 1 - row["label"]}])


def flores101(folder, part="devtest"):
    for code, lines in FLORES.items():
        write_lines(folder / "flores101_dataset" / part / f"{code}.{part}", lines)


def flores200(folder):
    for code, lines in FLORES.items():
        write_lines(folder / "flores200_dataset" / "devtest" / f"{FLORES200[code]}.devtest", lines)
        write_lines(folder / "flores200_dataset" / "dev" / f"{FLORES200[code]}.dev", lines[:1])


LAYOUTS = {
    "xcsqa, published": ("xcsqa", xcsqa_published),
    "xcsqa, original": ("xcsqa", xcsqa_original),
    "xnli, published": ("xnli", xnli_published),
    "xnli, original lines": ("xnli", xnli_jsonl),
    "xnli, original table": ("xnli", xnli_tsv),
    "xcopa, original": ("xcopa", xcopa_original),
    "flores, 101": ("flores", flores101),
    "flores, 200": ("flores", flores200),
    "flores, 101 dev": ("flores", lambda folder: flores101(folder, "dev")),
}


def hub_rows():
    """{task: {configuration: rows}} as the hub's datasets have them."""

    def columns(row):
        choices = row["question"]["choices"]
        lists = {name: [choice[name] for choice in choices] for name in ("label", "text")}
        return row | {"question": {"stem": row["question"]["stem"], "choices": lists}}

    return {
        "xcsqa": {f"X-CSQA-{rows[0]['lang']}": [columns(row) for row in rows] for rows in XCSQA.values()},
        "xnli": {
            lang: [
                {"premise": premise, "hypothesis": hypothesis, "label": LABELS[label]}
                for premise, hypothesis, label in rows
            ]
            for lang, rows in XNLI.items()
        },
        "xcopa": {lang: [row] for lang, row in XCOPA.items()},
        "flores": {
            FLORES200[code]: [{"id": number, "sentence": line} for number, line in enumerate(lines, 1)]
            for code, lines in FLORES.items()
        },
    }
