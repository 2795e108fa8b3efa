"""The page in a real browser: headless Chromium draws it, hovers, zooms and prints."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

pytest.importorskip("jinja2")

from deepspeed_sentinel.__main__ import main

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
RUNS = ("clean", "attacked", "guarded")  # in this order, as the demo writes them
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")

# Before all else of the page, and behind it: what goes wrong, and what a hand would do.
LISTEN = "<head><script>window.wrong = []; addEventListener('error', (one) => wrong.push(one.message));</script>"
ACT = """<script>
const map = document.getElementById('map'), tip = document.getElementById('tip'), told = new Set(), range = () =>
  document.getElementById('range').textContent, place = map.getBoundingClientRect();
for (let y = 2; y < place.height; y += 5) for (let x = 60; x < place.width; x += 5) {
  map.dispatchEvent(new PointerEvent('pointermove', { clientX: place.left + x, clientY: place.top + y }));
  if (tip.style.display === 'block') told.add(tip.textContent);
}
const whole = range(), height = map.height;
for (const id of ['in', 'right']) document.getElementById(id).click();
const zoomed = range();
document.getElementById('all').click();
map.dispatchEvent(new WheelEvent('wheel', { deltaY: -100, ctrlKey: true, clientX: place.left + place.width / 2 }));
const wheeled = range();
document.getElementById('rows').click();
const fewer = map.height;
document.getElementById('rows').click();
const pixels = new Set(), pen = map.getContext('2d'), image = pen.getImageData(0, 0, map.width, map.height).data;
for (let at = 0; at < image.length; at += 4) pixels.add(image[at] * 65536 + image[at + 1] * 256 + image[at + 2]);
const out = document.createElement('pre');
out.id = 'probe';
out.textContent = JSON.stringify({ wrong, told: [...told], whole, zoomed, wheeled, height, fewer, colours: pixels.size,
  losses: [...document.querySelectorAll('#losses span')].map((one) => one.textContent),
  inner: innerWidth, wide: document.documentElement.scrollWidth, stolen: window.stolen });
document.body.append(out);
</script></body>"""


def browse(page, *options):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


@pytest.fixture
def page(recorded, tmp_path):
    out, losses = tmp_path / "report.html", tmp_path / "progress.jsonl"
    told = [{"run": run, "step": step, "loss": 4.0 - step / 10} for run in RUNS for step in range(34)]
    losses.write_text("\n".join(map(json.dumps, told)))
    assert main(["report", str(recorded()), "--html", str(out), "--loss", str(losses)]) == 0
    return out


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_works_at(page, width):
    acting = page.with_name("acting.html")
    acting.write_text(page.read_text().replace("<head>", LISTEN).replace("</body>", ACT))
    dom = browse(acting, f"--window-size={width},900", "--dump-dom")
    probe = json.loads(unescape(re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert probe["wrong"] == [] and probe["inner"] == width
    assert probe["wide"] <= width, "nothing has to be moved sideways"
    assert probe["colours"] > 20
    assert probe["losses"] == [f"loss of {run}" for run in RUNS]
    (convicted,) = [one for one in probe["told"] if "conviction" in one]
    name, step, score, *_ = convicted.splitlines()
    assert name.startswith("stage 1, replica 2 (rank 5, node-03, cuda:3") and step == "step 32"
    assert re.fullmatch(r"score [\d.]+( or more)?", score)
    assert any("column 2: left out of the weights" in one for one in probe["told"])
    assert any("column 0: counted" in one for one in probe["told"])
    assert probe["whole"] == "steps 0 to 33" and probe["zoomed"] == "steps 17 to 33"
    assert probe["wheeled"] not in (probe["whole"], probe["zoomed"])
    assert probe["fewer"] < probe["height"], "one worker alone takes less room than all"


def test_the_page_prints(page, tmp_path):
    browse(page, f"--print-to-pdf={tmp_path / 'a.pdf'}", "--no-pdf-header-footer")
    assert (tmp_path / "a.pdf").read_bytes()[:5] == b"%PDF-"
