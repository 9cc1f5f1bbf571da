"""
probe.py: what a linear classifier reads off Whisper's taps, attribute by attribute.

    python tools/probe.py data/real/all.train.metadata.jsonl data/real/all.test.metadata.jsonl \\
        --audio_root data/real

An adapter does not name an attribute: is that Whisper's fault or the adapter's? If the classifier
fails on held-out clips too, Whisper's output may not hold it. If it succeeds, the attribute is
there to be learned. A clip is the mean and the standard deviation over its frames of each
channel of each tap; the classifier is logistic regression.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parent.parent))
from benchmarks.common import read_rows
from engine import run
from engine.run import argument, setting
from model import audio_windows
from whisper import SAMPLE_RATE, Whisper, log_mel, tap_layers


@dataclass
class Settings:
    train: str = argument("metadata of the clips to learn from")
    test: str = argument("metadata of the held-out clips")
    audio_root: str = setting("data/real", "folder that the clips' ids start from")
    whisper: str = setting("weights/whisper-tiny.en", "Hugging Face folder")
    audio_seconds: int = setting(6, "window of a clip", low=1, high=30)


@torch.no_grad()
def features(whisper, rows, s):
    """-> (clips, n_taps, 2 * d_model): mean and deviation over the frames that hold the clip"""
    taps, found = tap_layers(whisper.config.encoder_layers), []
    for row in tqdm(rows, unit="clip", disable=None):
        [waveform, *_] = audio_windows(row["id"], s.audio_root, s.audio_seconds, "cut", lambda _: 0)
        mel = log_mel([waveform], whisper.config.num_mel_bins, s.audio_seconds)
        n_frames = max(2, len(waveform) * 50 // SAMPLE_RATE)  # 20 ms each
        heard = whisper.encode(mel, taps)[0, :, :n_frames].float()
        found.append(torch.cat((heard.mean(1), heard.std(1)), dim=1))
    return torch.stack(found)


def probe(x, labels, test_x, test_labels, steps=60, decay=1e-3):
    """Logistic regression. x (N, D), labels (N,) -> the share of the test labels that it finds"""
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, test_x = (x - mean) / std, (test_x - mean) / std
    layer = torch.nn.Linear(x.shape[1], int(labels.max()) + 1)
    torch.nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(layer(x), labels) + decay * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (layer(test_x).argmax(-1) == test_labels).float().mean().item()


def main():
    s = run.parse_settings(Settings, __doc__)
    train, test = read_rows(s.train), read_rows(s.test)
    whisper = Whisper.from_pretrained(s.whisper)
    x, test_x = features(whisper, train, s), features(whisper, test, s)
    labels = lambda row: {k: v for part in row["segments"] for k, v in part["attributes"].items()}
    groups = {(row.get("dataset", ""), name) for row in train for name in labels(row)}
    for dataset, name in sorted(groups):
        of = lambda rows: {
            i: labels(row)[name]
            for i, row in enumerate(rows)
            if row.get("dataset", "") == dataset and name in labels(row)
        }
        ours, held_out = of(train), of(test)
        numbers = {value: n for n, value in enumerate(sorted(set(ours.values())))}
        # A value that was never trained on cannot be found, by the adapter neither.
        held_out = {i: value for i, value in held_out.items() if value in numbers}
        if len(numbers) < 2 or not held_out:
            continue
        tensor = lambda found: torch.tensor([numbers[value] for value in found.values()])
        parts = {"all taps": slice(None)} | {f"tap {n}": slice(n, n + 1) for n in range(x.shape[1])}
        found = [
            probe(x[list(ours), part].flatten(1), tensor(ours),
                  test_x[list(held_out), part].flatten(1), tensor(held_out))
            for part in parts.values()
        ]  # fmt: skip
        most = Counter(held_out.values()).most_common(1)[0][1] / len(held_out)
        scores = ", ".join(f"{part} {value:.2f}" for part, value in zip(parts, found))
        print(f"{dataset} {name}: {scores}; most frequent {most:.2f}; {len(held_out)} clips")


if __name__ == "__main__":
    run.main(main)
