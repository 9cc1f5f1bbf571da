"""demo/report.py: a made-up run folder becomes one page that needs nothing else, and a real browser
shows it.

python -m pytest tests/test_report.py        # needs demo/requirements.txt; the browser tests need
Debian's `chromium`
"""

import base64
import html.parser
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import heldout  # noqa: E402
from demo import report  # noqa: E402

STEPS, EVALS = 60, range(0, 61, 20)
# answers are shown as text, whatever they say
NASTY = '<script src="http://example.com/x.js">alert(1)</script> & "tea"'
DOMAINS = {
    # domain: attribute, its values one a clip. Not the same number in each domain: no clip may be
    # dropped for that.
    "music": ("Instrument", ["organ", "piano"]),
    "sound": ("Sound", ["siren", "clock", "alarm"]),
    "speech": ("Gender", ["male", "female"]),
}


def wave(i):
    """Two seconds of a gliding tone over a little noise, 16 kHz."""
    t = np.arange(32000) / 16000
    return 0.3 * np.sin(2 * np.pi * (300 + 150 * i + 400 * t) * t) + 0.02 * np.random.default_rng(
        i
    ).standard_normal(len(t))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """-> (data folder, out folder, prediction rows, the <audio>/<img>/… tags and texts of the page)"""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("out")
    (data / "clips").mkdir()
    rows = []
    for domain, (name, values) in DOMAINS.items():
        for k, value in enumerate(values):
            clip = f"clips/test_{len(rows):05d}.wav"
            soundfile.write(data / clip, wave(len(rows)), 16000, subtype="PCM_16")
            right = (
                f"I hear: {value}." if k == 0 else NASTY
            )  # the first clip of each domain is understood
            rows.append({
                "id": clip, "domain": domain, "prompt": "What is heard in the audio?",
                "description": f"[00:00-00:02] ({name}: {value})",
                "attributes": {name: value}, "wrong_id": "clips/test_00000.wav",
                "answers": {"text": f"The audio is a {value}.", "right": right, "wrong": "I do not know."},
                "loss": {"description": 5.0, "right": 10.0, "wrong": 20.0, "none": 15.0}, "target_tokens": 10,
            })  # fmt: skip
    log = [{"step": 0, "eval_loss": 3.0, "eval_loss_wrong_clip": 3.0}]
    for step in range(1, STEPS + 1):
        batch = {
            "loss": 1 + 2 * math.exp(-step / 20) + 0.1 * math.sin(step),
            "lr": 1e-3,
            "grad_norm": 1.0,
            "seconds": 0.5,
        }
        log.append({"step": step} | batch | {"rows_per_second": 64.0, "mfu": 0.3, "memory_gb": 1.0})
        if step in EVALS:
            log.append(
                {
                    "step": step,
                    "eval_loss": 1 + 2 * math.exp(-step / 20),
                    "eval_loss_wrong_clip": 2.0,
                }
            )
    lines = lambda records: "".join(
        json.dumps(record, ensure_ascii=False) + "\n" for record in records
    )
    (out / "predictions.jsonl").write_text(lines(rows), encoding="utf-8")
    (out / "predictions.jsonl.scores.json").write_text(
        json.dumps(heldout.score(rows)), encoding="utf-8"
    )
    (out / "log.jsonl").write_text(lines(log), encoding="utf-8")
    described = {
        "command": "train.py --lr 0.001",
        "settings": {},
        "git": "abc1234",
        "torch": "2.0",
        "device": "CPU, 2 cores",
        "world_size": 1,
    }
    (out / "run.json").write_text(json.dumps(described), encoding="utf-8")
    command = [sys.executable, "demo/report.py", "--data_dir", str(data), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = Page()
    page.feed((out / "report.html").read_text(encoding="utf-8"))
    return data, out, rows, page


class Page(html.parser.HTMLParser):
    """What a browser would make of the page: tags = [(tag, attributes)], tables = [[[cell, ...] of
    each row] of each table]
    """

    def __init__(self):
        super().__init__()
        self.tags, self.tables, self.in_cell = [], [], False

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.in_cell = tag in ("td", "th")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif self.in_cell:
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        self.in_cell = False

    def handle_data(self, data):
        if self.in_cell:
            self.tables[-1][-1][-1] += data

    def sources(self, tag):
        return [attributes["src"] for name, attributes in self.tags if name == tag]


def unpack(source):
    assert source.startswith("data:"), source[:80]
    return base64.b64decode(source.split(",", 1)[1])


# -- the file --------------------------------------------------------------------------------------


def test_page_needs_nothing_else(run):
    _, out, _, page = run
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base"), (tag, attributes)
        for name in ("src", "href", "srcset", "poster", "data"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes[name][:80])
    text = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import", text[text.index("<style>") : text.index("</style>")])
    svg = unpack(page.sources("img")[0]).decode()
    assert set(re.findall(r'(?:href="|url\()(.)', svg)) == {"#"}, (
        "the plot refers to something outside itself"
    )


def test_every_clip_can_be_played(run):
    data, _, rows, page = run
    played = [unpack(source) for source in page.sources("audio")]
    assert sorted(played) == sorted((data / row["id"]).read_bytes() for row in rows)
    assert all("controls" in attributes for tag, attributes in page.tags if tag == "audio")
    assert len(page.sources("img")) == 1 + len(rows), (
        "the loss curve, and a spectrogram for every clip"
    )
    assert all(unpack(source).startswith(b"\x89PNG") for source in page.sources("img")[1:])


@pytest.mark.parametrize("format, subtype, played", [
    ("MP3", "MPEG_LAYER_III", "audio/mpeg"), ("FLAC", "PCM_16", "audio/flac"),
    ("OGG", "VORBIS", "audio/ogg"), ("WAV", "PCM_24", "audio/wav"),
    ("WAV", "ULAW", "rewritten"), ("AIFF", "PCM_16", "rewritten"),
])  # fmt: skip
def test_clips_of_any_format_can_be_played(format, subtype, played, tmp_path):
    file = tmp_path / f"clip.{format.lower()}"
    soundfile.write(
        file, np.stack([wave(0), wave(1)], axis=1), 16000, format=format, subtype=subtype
    )
    source, samples, rate = report.player(file)
    assert rate == 16000
    assert samples.ndim == 1
    assert abs(len(samples) - 32000) < 1600
    if played == "rewritten":
        again, _ = soundfile.read(io.BytesIO(unpack(source)))
        assert source.startswith("data:audio/wav;")
        assert np.abs(again - samples).max() < 1e-3
    else:
        assert source.startswith(f"data:{played};")
        assert unpack(source) == file.read_bytes()


def test_every_corpus_is_shown():
    """Rows are sorted by label: not only the first label's clips."""
    rows = [
        {"id": i, "dataset": name, "domain": "speech"}
        for name, n in (("a", 9), ("b", 2))
        for i in range(n)
    ]
    shown = lambda rows: [(row["dataset"], row["id"]) for row in report.shown_clips(rows)]
    assert shown(rows) == [("a", 0), ("b", 0), ("a", 2), ("b", 1), ("a", 4), ("a", 6), ("a", 8)]
    assert (
        len(
            shown(
                [
                    {"id": i, "dataset": name, "domain": "speech"}
                    for name in "abcde"
                    for i in range(8)
                ]
            )
        )
        == 4 * 5
    )
    assert len(shown([{"id": i, "dataset": "a", "domain": "speech"} for i in range(100)])) == 10


def test_tables_show_the_scores(run):
    """Figures worked out by hand: of n clips of a domain the model understood the first."""
    _, _, rows, page = run
    losses, naming, *clips, attributes = page.tables
    assert [row[-1] for row in losses[1:]] == [
        f"{x} ({x}–{x})" for x in ("0.500", "1.000", "1.500", "2.000")
    ]  # description, right, none, wrong
    right = {
        "music": "50.0 % (0.0–100.0)",
        "sound": "33.3 % (0.0–100.0)",
        "speech": "50.0 % (0.0–100.0)",
    }
    assert [row[:4] + row[-1:] for row in naming[1:]] == [
        [domain, "100.0 % (100.0–100.0)", right[domain], "0.0 % (0.0–0.0)",
            str(len(values))] for domain, (_, values) in DOMAINS.items()
    ]  # fmt: skip
    assert [row[0] for row in attributes[1:]] == [
        "music: Instrument",
        "sound: Sound",
        "speech: Gender",
    ]
    shown = sorted(tuple(row[1] for row in table[1:]) for table in clips)
    assert shown == sorted(
        tuple(row["answers"][slot] for slot in ("text", "right", "wrong")) for row in rows
    )


def test_loss_curve_has_every_point(run):
    _, out, _, page = run
    svg = (out / "loss.svg").read_text(encoding="utf-8")
    assert svg == unpack(page.sources("img")[0]).decode()
    # What is drawn in the axes has a clip-path, the legend's samples have none.
    paths = {
        color: d
        for d, color in re.findall(
            r'<path d="(M [^"]*)" clip-path="[^"]*" style="[^"]*stroke: (#\w+)', svg
        )
    }
    points = lambda color: [
        tuple(map(float, p.split())) for p in re.split("[ML]", paths[color])[1:]
    ]
    for color, n in (
        ("#888888", STEPS),
        ("#1a7f5a", len(EVALS)),
        ("#c2410c", len(EVALS)),
        ("#1d4ed8", 2),
    ):
        assert len(points(color)) == n, color
    right, wrong = points("#1a7f5a"), points("#c2410c")
    assert right[0] == wrong[0] and right[-1][1] > wrong[-1][1] + 30, (
        "the two curves start together, and the right clip's ends lower"
    )


# -- the browser -----------------------------------------------------------------------------------


def chromium(url, folder, *options):
    """Open a page in headless Chromium. -> (stdout, what the page put on the console)"""
    if not shutil.which("chromium"):
        pytest.skip("no `chromium` on this machine: apt-get install chromium")
    quiet = (
        "--disable-gpu --disable-background-networking --disable-component-update "
        "--disable-sync --no-first-run"
    ).split()
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        *quiet,
        f"--user-data-dir={folder}",
        "--enable-logging=stderr",
        *options,
        url,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_browser_reports_what_is_broken(tmp_path):
    """So that silence in the next tests means something."""
    (tmp_path / "broken.html").write_text(
        '<img src="file:///nowhere.png"><script>nowhere()</script>'
    )
    _, console = chromium((tmp_path / "broken.html").as_uri(), tmp_path / "profile", "--dump-dom")
    assert any("nowhere is not defined" in line for line in console), console


def test_browser_finds_the_players(run, tmp_path):
    _, out, rows, _ = run
    dom, console = chromium((out / "report.html").as_uri(), tmp_path / "profile", "--dump-dom")
    assert dom.count("<audio controls") == len(rows)
    assert dom.count("<img ") == 1 + len(rows)
    assert "<script" not in dom and not console, console


def test_browser_draws_the_plots(run, tmp_path):
    import matplotlib.image

    _, out, _, _ = run
    options = [
        f"--screenshot={tmp_path / 'page.png'}",
        "--window-size=1000,2400",
        "--force-device-scale-factor=1",
    ]
    _, console = chromium((out / "report.html").as_uri(), tmp_path / "profile", *options)
    assert not console, console
    pixels = (matplotlib.image.imread(tmp_path / "page.png")[..., :3] * 255).round().astype(int)
    assert pixels.shape == (2400, 1000, 3)
    for color in ((0x1A, 0x7F, 0x5A), (0xC2, 0x41, 0x0C)):
        assert (pixels == color).all(-1).sum() > 100, (
            f"the loss curve's line in {color} is not there"
        )
    colorful = pixels[np.ptp(pixels, axis=-1) > 60]  # text is grey; spectrograms are not
    assert len(np.unique(colorful, axis=0)) > 1000, "the spectrograms are not there"
