"""HTML pages that need nothing else: no script, no font, no address. Light and dark, and narrow enough for a phone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape


def whole_page(title: str, body: Iterable[str], style: str = "") -> str:
    """A page.

    Args:
        title: its name, plain text.
        body: HTML below it, the heading too.
        style: CSS beside that of all pages.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], first_number: int | None = None) -> Iterator[str]:
    """A table; where it is too wide it scrolls by itself.

    Args:
        header, rows: plain texts.
        first_number: the column from which on cells are numbers; None: all are texts, and on a phone each row is a list.
    """

    def attribute(column):
        if first_number is None:
            return f' class="text" data-name="{escape(header[column])}"'
        return ' class="n"' if column >= first_number else ""

    yield f'<div class="wide{" stack" if first_number is None else ""}"><table><tr>'
    yield "".join(f"<th{attribute(column)}>{escape(name)}</th>" for column, name in enumerate(header))
    yield "</tr>"
    for row in rows:
        yield (
            "<tr>" + "".join(f"<td{attribute(column)}>{escape(cell)}</td>" for column, cell in enumerate(row)) + "</tr>"
        )
    yield "</table></div>"


def definitions(values: Mapping[str, str]) -> Iterator[str]:
    """A list of names, each with what stands for it; plain texts."""
    yield "<dl>"
    yield from (f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in values.items())
    yield "</dl>"


_STYLE = """
:root{color-scheme:light dark;--back:#fff;--card:#f7f7f8;--text:#1b1b1f;--soft:#5c5f66;--rule:#dddfe3;--good:#00664a;--bad:#a33a00}
@media (prefers-color-scheme:dark){
:root{--back:#16171a;--card:#1f2125;--text:#ececf0;--soft:#a3a7b0;--rule:#363a41;--good:#4bd3a5;--bad:#ff9d5c}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:24px 20px 60px;background:var(--back);color:var(--text);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 4px}h2{font-size:1.2rem;margin:36px 0 10px}h3{font-size:1rem;margin:20px 0 6px}
p{margin:6px 0}.soft,figcaption span{color:var(--soft)}.good{color:var(--good)}.bad{color:var(--bad)}
.badge{display:inline-block;border:1px solid currentColor;border-radius:99px;padding:0 10px;margin-right:8px;
font-size:.85rem;font-weight:600}
.note{border-left:4px solid var(--bad);background:var(--card);padding:8px 14px;margin:10px 0;border-radius:0 6px 6px 0}
figure{margin:0;background:var(--card);border-radius:8px;padding:10px 10px 4px}figcaption{font-size:.9rem;margin:0 4px 4px}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;padding:6px 14px 6px 0;border-bottom:1px solid var(--rule);vertical-align:top;overflow-wrap:normal}
td.text{overflow-wrap:anywhere}
th{font-weight:600;color:var(--soft);white-space:nowrap}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
details{margin:10px 0}summary{cursor:pointer;color:var(--soft)}
pre{background:var(--card);border-radius:8px;padding:12px 14px;overflow-x:auto;font-size:.82rem;line-height:1.45;white-space:pre-wrap}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;margin:6px 0}dt{color:var(--soft)}dd{margin:0}
@media (max-width:560px){body{padding:16px 12px 40px}dl{grid-template-columns:1fr}dd{margin-bottom:6px}
.stack th{display:none}.stack tr{display:block;border-bottom:1px solid var(--rule);padding:6px 0}
.stack td{display:grid;grid-template-columns:5.2rem 1fr;border:0;padding:1px 0}.stack td::before{content:attr(data-name);color:var(--soft)}}
"""
