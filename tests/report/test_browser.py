"""The report in a real browser: nothing is wider than the screen, nothing fails to load, and one can read it in light and dark.

The page under test gets one more script and stands in a frame as wide as the screen it is made for, since Chromium opens no
window narrower than 500 pixels. The script tells the page around it what it measured; that page is printed.
"""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from synpo_fast.report.write import write_report
from synpo_fast.testing.clips import write_clip
from tests.report.runs import captions, demo, make_run, profile, step_row, write_rows

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")
MEASURE = """
const found = {errors: [], wide: [], cut: [], pictures: 0, broken: 0};
addEventListener("error", event => found.errors.push(String(event.message || event.target.outerHTML)), true);
addEventListener("securitypolicyviolation", event => found.errors.push("policy: " + event.violatedDirective));
// A violation of the policy is told a moment after it happened.
addEventListener("load", () => setTimeout(measure, 200));
const measure = () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
  const name = element => element.tagName + "." + element.className + " " + (element.textContent || "").slice(0, 40);
  const width = document.documentElement.clientWidth;
  for (const element of document.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    const scrolls = element.closest(".scroll") && !element.matches(".scroll");
    if (box.width && !scrolls && (box.right > width + 0.5 || box.left < -0.5)) found.wide.push(name(element));
    if (element.matches("p, h1, h2, h3, dd, dt, .tile, .card, pre") && element.scrollWidth > element.clientWidth + 1
        && getComputedStyle(element).display !== "inline") found.wide.push("inside " + name(element));
  }
  for (const text of document.querySelectorAll("svg text")) {
    const box = text.getBoundingClientRect(), frame = text.closest("svg").getBoundingClientRect();
    if (box.width && (box.left < frame.left - 1 || box.right > frame.right + 1)) found.cut.push(text.textContent);
  }
  for (const picture of document.images) {
    found.pictures += 1;
    found.broken += !picture.complete || picture.naturalWidth === 0;
  }
  found.width = width;
  found.scroll = document.documentElement.scrollWidth;
  const svg = document.querySelector("svg[data-x]"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + 0.75 * box.width, clientY: box.top + 9}));
  found.readout = [...svg.parentNode.querySelectorAll(".readout:not([hidden]) div")].map(row => row.innerText.split("\\n"));
  const colour = (element, what) => getComputedStyle(element)[what];
  const card = document.querySelector(".card.page, .tile, main .card");
  const ratio = [...document.querySelectorAll("thead th")].filter(cell => cell.textContent === "ratio")[0];
  const held = ratio && ratio.closest(".scroll").getBoundingClientRect();
  found.ratio = ratio ? [ratio.getBoundingClientRect().left >= held.left, ratio.getBoundingClientRect().right <= held.right] : [];
  found.first = document.querySelector("svg, table, .bars").tagName;
  const apart = unit => unit.getBoundingClientRect().top >= unit.parentNode.getBoundingClientRect().top + 12;
  found.units = [...document.querySelectorAll("td .unit")].map(apart);  // below its number, which stays in one line
  const cut = table => table.scrollWidth > table.parentNode.clientWidth + 1;
  found.hidden = [...document.querySelectorAll("table.stack")].filter(cut).length;
  found.colours = [
    [colour(document.body, "color"), colour(document.body, "backgroundColor")],
    [colour(document.querySelector(".soft"), "color"), colour(document.body, "backgroundColor")],
    [colour(document.querySelector(".note"), "color"), colour(card, "backgroundColor")],
    [colour(document.querySelector("svg text"), "fill"), colour(card, "backgroundColor")],
  ];
  parent.postMessage(JSON.stringify(found), "*");
};
"""
AROUND = """<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><body style="margin:0">
<script>addEventListener("message", event => {
  const out = document.createElement("pre");
  out.id = "measured";
  out.textContent = event.data;
  document.body.append(out);
});</script><iframe src="copy.html" style="border:0;width:WIDTHpx;height:900px"></iframe>"""


def browser():
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    found += map(str, sorted(Path.home().glob(".cache/ms-playwright/chromium*/chrome-linux*/*hrome*")))
    return next((path for path in found if Path(path).is_file()), None)


needs_browser = pytest.mark.skipif(
    browser() is None, reason=f"needs a headless Chromium, one of: {', '.join(BROWSERS)}"
)


def look_at(page, folder, *, width, dark=False, more=""):
    """Returns what MEASURE finds in a copy of the page, and the lines of the browser's console."""
    source = page.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(MEASURE.encode()).digest()).decode()
    source = source.replace("script-src '", f"script-src 'sha256-{digest}' '", 1)
    copy = folder / "copy.html"
    copy.write_text(
        source.replace("</head>", f"<script>{MEASURE}</script></head>", 1).replace("</main>", f"{more}</main>")
    )
    around = folder / "around.html"
    around.write_text(AROUND.replace("WIDTH", str(width)))
    command = [
        browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--hide-scrollbars", "--window-size=1400,1000",
        "--virtual-time-budget=3000", f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", around.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    match = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.S)
    assert match, done.stderr[-2000:]
    return json.loads(html.unescape(match[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """One run with everything in it, and three of different losses beside each other; long names, words of 200 letters."""
    folder = tmp_path_factory.mktemp("pages")
    long = "x" * 200
    rows = [step_row(step, 300) for step in range(1, 301)]
    for row in rows:
        row |= {
            "diagnostics/grad_norm_chosen": 3e-7,
            "diagnostics/grad_norm_rejected": 2e-9,
            "own": 123456.7 + 1e-3 * row["step"],
        }
    rows += [
        {
            "step": 150,
            "eval_loss": -0.6,
            "eval_captions": captions(long) + captions("words " * 300, video=f"{long}.mp4"),
        }
    ]
    runs = [make_run(folder / f"a-run-with-a-long-name-{name}-{'z' * 60}", rows=rows, loss_type=loss) for name, loss in
            (("one", "synpo"), ("two", "dpo"), ("three", "simpo"))]  # fmt: skip
    for run in runs:
        write_clip(run / "v0.mp4", codec="h264", num_frames=9, width=160, height=90, fps=8)
        bad = [
            {"id": f"{long}{number}", "reason": f"/data/{long}.mp4: there is no such file", "epoch": 0}
            for number in range(60)
        ]
        write_rows(run / "skipped_pairs.rank0.jsonl", bad)
    (runs[0] / "profile.json").write_text(json.dumps(profile()))
    (runs[0] / "demo.json").write_text(json.dumps(demo("v0.mp4")))
    return {"one": write_report(runs[:1], folder / "one.html"), "three": write_report(runs, folder / "three.html")}


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 768, 390])
@pytest.mark.parametrize("name", ["one", "three"])
def test_the_page_fits_loads_and_can_be_read(pages, name, width, dark, tmp_path):
    found, console = look_at(pages[name], tmp_path, width=width, dark=dark)
    assert found["width"] == width and found["scroll"] <= width
    assert found["wide"] == [] and found["cut"] == []
    assert found["errors"] == [] and console == []
    assert found["pictures"] >= 4 and found["broken"] == 0
    assert found["readout"][0] == ["step", "223"] or abs(int(found["readout"][0][1]) - 223) < 20
    assert len(found["readout"]) == (2 if name == "one" else 4)
    value = float(found["readout"][1][1].removesuffix(" %"))
    assert value == pytest.approx(100 * step_row(int(found["readout"][0][1]), 300)["rewards/accuracies"], abs=1)
    assert found["first"] == "svg" and found["ratio"] == [True, True] and found["hidden"] == 0
    assert all(found["units"]) and len(found["units"]) == (0 if name == "one" else 7 * 3)
    for ink, paper in found["colours"]:
        assert contrast(ink, paper) >= 4.5, (ink, paper)
    assert (luminance(found["colours"][0][1]) < 0.1) == dark


@needs_browser
def test_what_does_not_fit_or_load_is_found(pages, tmp_path):
    """The measure itself: a wide box, a picture from elsewhere and a script in the page must all be seen."""
    more = (
        '<p style="width:1500px">wide</p><img src="https://example.invalid/a.png"><script>throw Error("late")</script>'
    )
    found, console = look_at(pages["one"], tmp_path, width=390, more=more)
    assert found["scroll"] > 1400 and any("wide" in name for name in found["wide"])
    assert found["broken"] == 1
    assert any("policy: img-src" in error for error in found["errors"]) and console
    assert any("policy: script-src" in error for error in found["errors"]) and not any(
        "late" in e for e in found["errors"]
    )


def luminance(colour):
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first, second):
    """The contrast of two colours as WCAG defines it."""
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)
