"""The report's style sheet. Colours of lines: Okabe and Ito's, told apart with any common colour vision, lighter where the page is dark."""

from __future__ import annotations

# The yellow of the palette is left out: on white it cannot be read.
_LIGHT = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#B07D00", "#3A9BD9", "#555555", "#882255")
_DARK = ("#56B4E9", "#F28E3C", "#2FCB9B", "#E08BC8", "#E6B800", "#8CD0FF", "#BBBBBB", "#DD77AA")
COLOURS = len(_LIGHT)


def style() -> str:
    """CSS of the page and of its charts."""
    return _PAGE.replace("LIGHT;", _variables(_LIGHT)).replace("DARK;", _variables(_DARK)) + "".join(
        f".s{number}{{stroke:var(--c{number})}}.f{number}{{fill:var(--c{number})}}text.c{number}{{fill:var(--c{number})}}"
        for number in range(1, COLOURS + 1)
    )


def _variables(colours: tuple[str, ...]) -> str:
    return "".join(f"--c{number}:{colour};" for number, colour in enumerate(colours, 1))


_PAGE = """
:root{color-scheme:light dark;--back:#fff;--card:#f7f7f8;--text:#1b1b1f;--soft:#5c5f66;--rule:#dddfe3;--good:#00664a;--bad:#a33a00;LIGHT;}
@media (prefers-color-scheme:dark){
:root{--back:#16171a;--card:#1f2125;--text:#ececf0;--soft:#a3a7b0;--rule:#363a41;--good:#4bd3a5;--bad:#ff9d5c;DARK;}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:24px 20px 60px;background:var(--back);color:var(--text);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 4px}h2{font-size:1.2rem;margin:36px 0 10px}h3{font-size:1rem;margin:20px 0 6px}
p{margin:6px 0}.soft,figcaption span{color:var(--soft)}.good{color:var(--good)}.bad{color:var(--bad)}
.badge{display:inline-block;border:1px solid currentColor;border-radius:99px;padding:0 10px;margin-right:8px;
font-size:.85rem;font-weight:600}
.note{border-left:4px solid var(--bad);background:var(--card);padding:8px 14px;margin:10px 0;border-radius:0 6px 6px 0}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr));gap:14px}
figure{margin:0;background:var(--card);border-radius:8px;padding:10px 10px 4px}figcaption{font-size:.9rem;margin:0 4px 4px}
svg{display:block;width:100%;height:auto;font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
.tick{fill:var(--soft)}.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}.faint{stroke-width:1;opacity:.3}.end{font-weight:600}
.dashed{stroke-dasharray:5 4}.leader{fill:none;stroke-width:1;opacity:.45}
.heat{fill:var(--c1);shape-rendering:crispEdges}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;padding:6px 14px 6px 0;border-bottom:1px solid var(--rule);vertical-align:top;overflow-wrap:normal}
td.text{overflow-wrap:anywhere}
th{font-weight:600;color:var(--soft);white-space:nowrap}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
details{margin:10px 0}summary{cursor:pointer;color:var(--soft)}
pre{background:var(--card);border-radius:8px;padding:12px 14px;overflow-x:auto;font-size:.82rem;line-height:1.45;white-space:pre-wrap}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;margin:6px 0}dt{color:var(--soft)}dd{margin:0}
@media (max-width:560px){body{padding:16px 12px 40px}svg{font-size:13px}dl{grid-template-columns:1fr}dd{margin-bottom:6px}
.stack th{display:none}.stack tr{display:block;border-bottom:1px solid var(--rule);padding:6px 0}
.stack td{display:grid;grid-template-columns:5.2rem 1fr;border:0;padding:1px 0}.stack td::before{content:attr(data-name);color:var(--soft)}}
"""
