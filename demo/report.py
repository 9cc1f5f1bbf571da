"""
report.py: what a run learned, as one self-contained page: OUT/report.html, and its plot as
OUT/loss.svg.

    python demo/report.py --data_dir data/demo --out out/demo
"""

import base64
import collections
import dataclasses
import html
import io
import itertools
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import soundfile

sys.path.append(str(Path(__file__).resolve().parent.parent))
from benchmarks.common import read_rows
from engine.checkpoint import write_text
from engine.run import main, parse_settings, setting
from engine.sound import read_sound
from engine.weights import read_json
from tools import plot

plt.switch_backend("svg")  # files, no window

GIVEN = {
    "description": "the description (what the LLM read)",
    "right": "the right clip",
    "transcript": "the transcript alone",
    "wrong_sound": "the transcript and a wrong clip's sound",
    "none": "nothing",
    "vectors": "the clip's sound, no transcript",
    "wrong": "a wrong clip",
}
ANSWERS = {
    "text": "the description (upper bound)",
    "right": "the right clip",
    "transcript": "the transcript alone",
    "wrong_sound": "the transcript and a wrong clip's sound",
    "vectors": "the clip's sound, no transcript",
    "wrong": "a wrong clip",
    "same_domain": "chance within the domain",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1000px;
       margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem }
img { max-width: 100% }
audio { width: 100% }
small { color: #666 }
table { border-collapse: collapse }
td, th { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: left;
         vertical-align: top }
.numbers td { white-space: nowrap }
.clip { display: flex; flex-wrap: wrap; gap: 1rem; padding: 1rem; margin: 1rem 0;
        border: 1px solid #ddd; border-radius: 8px }
.clip > :first-child { width: 310px }
.clip > :last-child { flex: 1 1 24rem }
.clip p { margin: .3rem 0 }
"""


@dataclasses.dataclass
class Settings:
    data_dir: str = setting("data/demo", "folder that the clips' ids start from")
    out: str = setting("out/demo", "folder of train.py and eval.py; the report goes there too")


# -- pictures and tables ---------------------------------------------------------------------------


def data_url(kind, data):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def draw(figure, kind):
    """-> the picture as bytes, svg or png"""
    data = io.BytesIO()
    figure.savefig(data, format=kind, bbox_inches="tight", dpi=100)
    plt.close(figure)
    return data.getvalue()


def loss_curve(log, scores):
    """-> svg: the losses over the steps, and the loss given the description"""
    figure, axis = plt.subplots(figsize=(8, 4))
    plot.draw(axis, log)
    line = {"color": "#1d4ed8", "linestyle": "--", "linewidth": 1}
    if "description" in scores["loss"]:  # not where eval.py was told of other ways
        axis.axhline(scores["loss"]["description"][0], label="given the description", **line)
    plot.finish(axis, plot.COLORS)
    return draw(figure, "svg")


def spectrogram(samples, rate):
    """-> png"""
    figure, axis = plt.subplots(figsize=(4, 1.8))
    picture = axis.specgram(samples + 1e-6, NFFT=400, Fs=rate, noverlap=240, cmap="magma")[3]
    # 80 dB below the loudest: digital silence would stretch the colours
    picture.set_clim(picture.get_clim()[1] - 80)
    axis.set(xlabel="s", ylabel="Hz")
    return draw(figure, "png")


def table(header, rows, kind="text"):
    def line(tag, row):
        cells = (f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)
        return f"<tr>{''.join(cells)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<table class="{kind}">{line("th", header)}{body}</table>'


def player(file):
    """A file of any format that soundfile reads -> (data URL that browsers play, samples (n,), rate)

    The file's own bytes, where browsers know the format; else a 16-bit wav. Many corpora hold wav
    files with MPEG layer III inside, which browsers refuse.
    """
    samples, rate = read_sound(file, warn=lambda text: None)
    samples = samples.mean(axis=1)
    info = soundfile.info(file)
    kinds = {"WAV": "audio/wav", "MPEG": "audio/mpeg", "MP3": "audio/mpeg"}
    kinds |= {"FLAC": "audio/flac", "OGG": "audio/ogg"}
    if info.format in kinds and not (info.format == "WAV" and "PCM" not in info.subtype):
        return data_url(kinds[info.format], file.read_bytes()), samples, rate
    wav = io.BytesIO()
    soundfile.write(wav, samples, rate, format="WAV", subtype="PCM_16")
    return data_url("audio/wav", wav.getvalue()), samples, rate


# -- the page --------------------------------------------------------------------------------------


def clip(row, folder):
    """One held-out clip: player, spectrogram, description; instruction and the answers."""
    sound, samples, rate = player(folder / row["id"])
    picture = data_url("image/png", spectrogram(samples, rate))
    answers = [(ANSWERS[given], answer) for given, answer in row["answers"].items()]
    corpus = f"{row['dataset']}: " if row.get("dataset") else ""
    return f"""<div class="clip">
<div><img alt="spectrogram" src="{picture}"><audio controls src="{sound}"></audio>
<small>{html.escape(corpus + row["description"])}</small></div>
<div><p><b>{html.escape(row["prompt"])}</b></p>{table(["given", "answer"], answers)}</div>
</div>"""


def shown_clips(rows):
    """Some ten clips, but about four of each corpus, or of each domain, taking turns; from all
    over its list, which may be sorted by label.
    """
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row.get("dataset") or row["domain"]].append(row)
    most = max(4, 10 // len(groups))
    some = [group[:: -(-len(group) // most)] for group in groups.values()]
    return [row for turn in itertools.zip_longest(*some) for row in turn if row]


def page(rows, scores, run, curve, folder):
    """The whole page as text. rows: predictions; run: run.json; curve: svg; folder: of the clips"""
    percent = lambda value: "{:.1f} % ({:.1f}–{:.1f})".format(*(100 * x for x in value))
    asked = [given for given in ANSWERS if all(given in g for g in scores["naming"].values())]
    rates = lambda name, group: [name, *(percent(group[given]) for given in asked), group["rows"]]
    header = ["", *(ANSWERS[given] for given in asked), "clips"]
    naming = [rates(domain, group) for domain, group in scores["naming"].items()]
    by_attribute = lambda groups: [
        rates(f"{name}: {attribute}", group)
        for name, attributes in groups.items()
        for attribute, group in attributes.items()
    ]
    corpora = by_attribute(scores.get("datasets", {}))
    by_corpus = f"""<h2>Corpus by corpus; chance is taken within the corpus</h2>
{table(header, corpora, "numbers")}"""
    per_token = lambda value: "{:.3f} ({:.3f}–{:.3f})".format(*value)
    losses = [
        (label, per_token(scores["loss"][given]))
        for given, label in GIVEN.items()
        if given in scores["loss"]
    ]
    made_by = f"{run['command']} · commit {run['git']} · {run['device']} · torch {run['torch']}"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>DeSTA2.5-Audio demo</title><style>{STYLE}</style>
<h1>What the adapter hears</h1>
<p><small>{html.escape(made_by)}</small></p>
<img alt="loss over the training steps" src="{data_url("image/svg+xml", curve)}">
<h2>Loss of the target, given</h2>
{table(["given", "loss per token (95 % interval)"], losses, "numbers")}
<h2>How often an answer names the clip's attributes (95 % interval)</h2>
{table(header, naming, "numbers")}
{by_corpus if corpora else ""}
<h2>Held-out clips: some of each kind</h2>
{"".join(clip(row, folder) for row in shown_clips(rows))}
<h2>Attribute by attribute</h2>
{table(header, by_attribute(scores["attributes"]), "numbers")}
"""


def report():
    settings = parse_settings(Settings, __doc__)
    out = Path(settings.out)
    rows, log = (read_rows(out / name) for name in ("predictions.jsonl", "log.jsonl"))
    scores, run = (read_json(out / f) for f in ("predictions.jsonl.scores.json", "run.json"))
    curve = loss_curve(log, scores)
    write_text(out / "loss.svg", curve.decode())
    write_text(out / "report.html", page(rows, scores, run, curve, Path(settings.data_dir)))
    print(f"{out / 'report.html'}: {len(rows)} held-out clips")


if __name__ == "__main__":
    main(report)
