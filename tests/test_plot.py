"""tools/plot.py: the curves of runs in one picture."""

import json

import numpy as np
import pytest
from conftest import ROOT, script, write_jsonl


@pytest.fixture
def plot(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import plot

    plot.plt.switch_backend("agg")
    yield plot
    plot.plt.close("all")


def log(n=100):
    records = [{"step": 0, "eval_loss": 3.0, "eval_loss_wrong_clip": 3.5}]
    records += [{"step": i, "loss": 3 - i / n + 0.1 * (-1) ** i} for i in range(1, n + 1)]
    records += [{"step": n + 1, "loss": None}, {"step": n + 2, "skipped": "loss nan", "rows": []}]
    return records + [{"step": n, "eval_loss": 1.0, "eval_loss_wrong_clip": 3.25}]


def test_curves_of_one_run(plot):
    axis = plot.plt.subplots()[1]
    plot.draw(axis, log(), "mine")
    curves = [line.get_xydata().tolist() for line in axis.lines if len(line.get_xdata())]
    assert len(curves[0]) == 100
    assert curves[1:] == [[[0, 3], [100, 1]], [[0, 3.5], [100, 3.25]]]
    assert len({line.get_color() for line in axis.lines}) == 1
    # Two neighbours, a fiftieth of the run: the zigzag of 0.1 is gone, the trend is not.
    np.testing.assert_allclose(np.array(curves[0])[1:, 1], 3 - (np.arange(2, 101) - 0.5) / 100)
    plot.finish(axis)
    kinds = ["training, smoothed", "held out, right clip", "held out, wrong clip"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["mine", *kinds]


def test_runs_are_named_by_folder(plot, tmp_path):
    for name in ("a/demo", "b/demo", "c/other"):
        (tmp_path / name).mkdir(parents=True)
        write_jsonl(tmp_path / name / "log.jsonl", log())
    figure = plot.plot_runs([tmp_path / name for name in ("a/demo", "b/demo", "c/other")])
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names[:3] == [str(tmp_path / "a/demo"), str(tmp_path / "b/demo"), "other"]


def test_command(tmp_path):
    write_jsonl(tmp_path / "log.jsonl", log())
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write(json.dumps(log()[1])[:-4])  # a line that is being written
    done = script("tools/plot.py", tmp_path, "--out", tmp_path / "curves.svg")
    assert done.status == 0 and "</svg>" in (tmp_path / "curves.svg").read_text(encoding="utf-8"), (
        done.err
    )
    for arguments, said in (([], "name the folders"), ([tmp_path / "none"], "log.jsonl is missing"),
                            (["--speed", tmp_path / "log.jsonl"], "no result of")):  # fmt: skip
        done = script("tools/plot.py", *arguments)
        assert done.status
        assert said in done.err
