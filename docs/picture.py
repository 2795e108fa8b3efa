"""Draws ``judged.svg``, the README's picture of how a message is judged: ``python docs/picture.py``.

Three rows that are read from left to right, about as wide as GitHub shows a README; on a card of its own, so that it
can be read on a light and on a dark page. A question is a box with round ends, and each arrow that leaves it says which
answer it is. A test compares the file with what this draws.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

FILE = Path(__file__).with_name("judged.svg")
WIDTH, HEIGHT = 900, 410
INK, QUIET, LINE = "#1f2328", "#57606a", "#6e7781"
# (fill, edge) of what is a step of the way, is asked, counts, is left out, is convicted
PLAIN, ASKED = ("#f3f5f8", "#8c959f"), ("#eaf2ff", "#2563c9")
GOOD, DOUBT, BAD = ("#dff5e5", "#14602d"), ("#fff1d0", "#7a4b00"), ("#ffe3e0", "#a1251b")
TITLE, TEXT = 14.5, 13
Point = tuple[float, float]


def text(x: float, y: float, words: str, size: float = TEXT, colour: str = INK, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}" {more}>{escape(words)}</text>'


def middle(x: float, y: float, words: str, size: float = TEXT, colour: str = INK, weight: int = 400) -> str:
    return text(x, y, words, size, colour, f'text-anchor="middle" font-weight="{weight}"')


def arrow(*points: Point, colour: str = LINE, label: str = "", at: Point = (0, 0), anchor: str = "middle") -> str:
    """A line through ``points`` with a head at the last one, to the right or down, and ``label`` at ``at``."""
    (x, y), (left, _) = points[-1], points[-2]
    (a, b), (c, d) = ((-7, -5), (-7, 5)) if x > left else ((-5, -7), (5, -7))
    way = " L ".join(f"{px:g} {py:g}" for px, py in points)
    head = f"M {x + a:g} {y + b:g} L {x:g} {y:g} L {x + c:g} {y + d:g}"
    drawn = f'<path d="M {way} {head}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
    if not label:
        return drawn
    style = f'text-anchor="{anchor}" font-weight="600"'
    return f"{drawn}\n{text(*at, label, TEXT, colour, style)}"


def box(place: tuple[float, float, float, float], colours: tuple[str, str], title: str = "", *lines: str) -> str:
    """A box at ``place`` (left, top, width, height) with a title and lines, in the middle of it."""
    left, top, width, height = place
    fill, edge = colours
    rounded = height / 2 if colours is ASKED else 8
    around = f'x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="{rounded:g}"'
    ink = INK if colours in (PLAIN, ASKED) else edge
    drawn = f'<rect {around} fill="{fill}" stroke="{edge}" stroke-width="1.6"/>'
    return f"{drawn}\n{words_in(place, ink, title, *lines)}" if title else drawn


def words_in(place: tuple[float, float, float, float], ink: str, title: str, *lines: str) -> str:
    """A title, of which a line break makes two lines, and lines in the middle of ``place``."""
    left, top, width, height = place
    titles = title.splitlines()
    y = top + (height - 19 * (len(titles) + len(lines))) / 2 + 14.5
    parts = [middle(left + width / 2, y + 19 * at, words, TITLE, ink, 600) for at, words in enumerate(titles)]
    y += 19 * len(titles)
    parts += [middle(left + width / 2, y + 19 * at, words, TEXT, ink) for at, words in enumerate(lines)]
    return "\n".join(parts)


def mesh(left: float, top: float) -> str:
    """Three stages, three columns; one worker's message is not as the others'."""
    columns, rows = [left + 92 + 46 * at for at in range(3)], [top + 26 + 36 * at for at in range(3)]
    parts = [text(left, top + 5, "column", TEXT, QUIET)]
    for column, x in enumerate(columns):
        parts.append(middle(x, top + 5, str(column), TEXT, QUIET))
        for stage, y in enumerate(rows):
            bad = (column, stage) == (2, 1)
            fill, edge = BAD if bad else PLAIN
            parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="9" fill="{fill}" stroke="{edge}" stroke-width="1.6"/>')
            if stage < 2:
                parts.append(arrow((x, y + 10), (x, y + 26), colour=edge if bad else LINE))
    parts += [text(left, y + 5, f"stage {stage}", TEXT, QUIET) for stage, y in enumerate(rows)]
    return "\n".join(parts)


def picture() -> str:
    """The whole SVG."""
    first, second, third = 50, 172, 308
    green, amber, red = GOOD[1], DOUBT[1], BAD[1]
    parts = [
        box((16, first, 224, 82), PLAIN, "Each message is read", "at both ends; what they", "report reaches all ranks"),
        arrow((240, first + 41), (274, first + 41)),
        box((274, first, 166, 82), ASKED, "Do both ends\nreport the same?"),
        arrow((440, first + 41), (490, first + 41), colour=green, label="yes", at=(463, first + 33)),
        box((490, first, 150, 82), ASKED, "Is it inside\nthe fences?"),
        arrow((640, first + 41), (690, first + 41), colour=green, label="yes", at=(663, first + 33)),
        box((690, first, 194, 82), GOOD, "IT COUNTS", "DeepSpeed reduces", "and steps as always"),
        mesh(28, second - 10),
        arrow((357, first + 82), (357, second), colour=amber, label="no", at=(366, second - 14), anchor="start"),
        arrow((565, first + 82), (565, second), colour=amber, label="no", at=(574, second - 14), anchor="start"),
        box((274, second, 366, 82), DOUBT),
        f'<path d="M 461 {second + 10} V {second + 72}" stroke="{amber}" opacity="0.5"/>',
        words_in((274, second, 187, 82), amber, "DISPUTE", "both ends are suspects", "and get other partners"),
        words_in((461, second, 179, 82), amber, "ALARM", "the first in the flow", "is a suspect"),
        arrow((640, second + 41), (690, second + 41), colour=amber),
        box((690, second, 194, 82), DOUBT, "LEFT OUT", "this column does not", "count in this step"),
        arrow((457, second + 82), (457, third - 22), (128, third - 22), (128, third), colour=amber,
            label="suspects are tried", at=(292, third - 28)),
        box((16, third, 224, 82), PLAIN, "Twin step", "all columns, the same data:", "honest work is bit-equal"),
        arrow((240, third + 41), (274, third + 41)),
        box((274, third, 166, 82), ASKED, "Same bits as most\nof its stage?"),
        arrow((436, third + 22), (490, third + 13), colour=green, label="yes", at=(463, third + 8)),
        arrow((436, third + 60), (490, third + 65), colour=red, label="no", at=(463, third + 80)),
        box((490, third - 4, 150, 30), GOOD, "CLEARED"),
        box((490, third + 36, 150, 50), BAD, "CONVICTED", "proved and named"),
        arrow((640, third + 61), (690, third + 61), colour=red),
        box((690, third + 4, 194, 82), GOOD, "Columns dealt anew", "convicted share columns,", "the others go on"),
    ]  # fmt: skip
    body = "\n".join(parts)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" \
viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif">
<title>How a message is judged</title>
<desc>A message that crosses a stage boundary is read at both ends. Where the ends differ there is a dispute, where it
lies outside the fences an alarm; in both cases its column is left out of the step. Suspects are tried in a twin step,
in which all columns get the same data, and cleared or convicted by exact comparison. Then columns are dealt anew, so
that convicted workers share columns and training goes on with the others.</desc>
<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="12" fill="#ffffff" stroke="#d0d7de"/>
{text(16, 33, "How a message is judged", 19, INK, 'font-weight="700"')}
{body}
</svg>
"""


if __name__ == "__main__":
    FILE.write_text(picture(), encoding="utf-8")
    print(FILE)
