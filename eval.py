"""
eval.py: run a benchmark, write predictions in the form its authors' scorer reads, print the scores (paper section 5).

    python eval.py                                                      # the demo's held-out clips
    torchrun --nproc_per_node=8 eval.py --task mmau --data mmau-test-mini.json --audio_root DIR --llm DIR --whisper DIR --adapter DIR --out P.jsonl
    python eval.py --task mmau --score P.jsonl                          # score anybody's predictions: no model needed
    python eval.py --task mmau --score P.jsonl,COT.jsonl                # several side by side: here without and with --cot 1

Tasks are the files of benchmarks/: what to ask and how to score stands there. The last line printed is one JSON object.
"""

import dataclasses
import importlib
import inspect
import json
import shutil
from pathlib import Path

import common
from common import setting


@dataclasses.dataclass
class Settings:
    task: str = setting("heldout", "heldout, mmau, sakura, speech_ifeval, voicebench or dynamic_superb")
    data: str = setting("data/demo/test.jsonl", "the benchmark's file or folder, as released; with --score, its labels")
    audio_root: str = setting("data/demo", "folder that its audio paths start from")
    llm: str = setting("weights/smollm2-135m-instruct", "Hugging Face folder")
    whisper: str = setting("weights/whisper-tiny.en", "Hugging Face folder")
    adapter: str = setting("out/demo/adapter", "folder written by train.py, or the released one")
    out: str = setting("out/demo/predictions.jsonl", "predictions to write; scores go to OUT.scores.json, the official form to OUT.official")
    score: str = setting("", "score this predictions file, without a model; several, separated by commas, side by side")
    judge: str = setting("", "Hugging Face folder of a local LLM that stands in for the official judge")
    text_only: int = setting(0, "1: the backbone alone answers from the text of the audio (the reference of speech_ifeval)", high=1)
    system: str = setting("", "system prompt instead of the benchmark's own, or a .json file of messages: with worked examples")
    cot: int = setting(0, "1: ask for step-by-step reasoning before the answer (our wording)", high=1)
    precision: str = setting("fast", "official: Whisper and Q-Former in float32")
    long_audio: str = setting("", "cut or split: whether more than the adapter's window is heard; '' means as it was trained")
    max_new_tokens: int = setting(-1, "-1 means the benchmark's own limit", low=1, high=100_000)
    temperature: float = setting(0.0, "0 is greedy, as in all five benchmarks", high=100)
    top_p: float = setting(1.0, "nucleus sampling, where temperature is not 0", low=1e-6, high=1)
    batch_size: int = setting(32, "rows in flight while generating", low=1)
    block: int = setting(64, "rows saved together; at most this many are lost by a kill", low=1)
    limit: int = setting(-1, "only the first so many rows; -1 means all", low=1)
    options: str = setting("", "more for the task's load(), as JSON, e.g. '{\"subset\": \"openbookqa\"}'")


def answer(model, rows, task, max_new_tokens, root, **options):
    """Default for tasks without an `answer` of their own: one answer per row."""
    answers = model.generate([row["messages"] for row in rows], max_new_tokens, root=root, **options)
    return [task.with_answer(row, text) for row, text in zip(rows, answers)]


def as_text(value):
    """Three numbers are a value and its 95 % interval."""
    if isinstance(value, list) and len(value) == 3 and all(isinstance(x, float) for x in value):
        return "{:.3f}  [{:.3f}, {:.3f}]".format(*value)
    return str(value)


def print_scores(columns, indent=0):
    """Nested dicts as an indented list; of several predictions files, the values side by side."""
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [column.get(name, "-") for column in columns]
        if any(isinstance(value, dict) for value in values):
            print("  " * indent + str(name))
            print_scores([value if isinstance(value, dict) else {} for value in values], indent + 1)
        else:
            print("  " * indent + f"{name:<{max(1, 36 - 2 * indent)}} " + "  ".join(f"{as_text(value):<24}" for value in values).rstrip())


def main():
    s = common.parse_settings(Settings, __doc__)
    tasks = sorted(file.stem for file in (Path(__file__).parent / "benchmarks").glob("*.py") if file.stem not in ("common", "__init__"))
    if s.task not in tasks:
        raise ValueError(f"--task {s.task!r} is none of {', '.join(tasks)}")
    if s.precision not in ("fast", "official"):
        raise ValueError(f"--precision {s.precision!r} is neither fast nor official")
    if not s.score and Path(s.out).is_dir():
        raise ValueError(f"--out {s.out!r} is a folder: give a file name")
    task = importlib.import_module(f"benchmarks.{s.task}")
    if s.judge and not hasattr(task, "judge_messages"):
        raise ValueError(f"--task {s.task} is scored by rules alone: it takes no --judge")
    if s.score:
        files = [s.score] if Path(s.score).exists() else s.score.split(",")
        rank, failed, predictions = 0, [], {file: task.read_predictions(file) for file in files}
    else:
        rank, rows, failed = predict(s, task)
        predictions = {s.out: rows}
    if rank == 0:
        # With --score, a --data file holds the benchmark's labels: predictions made for another revision are found out.
        labels = {"labels": s.data} if s.score and s.data != Settings.data else {}
        judge = make_judge(s) if s.judge else None
        try:
            scores = {file: task.score(rows, judge, **labels) for file, rows in predictions.items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{' or '.join(predictions)} does not hold what --task {s.task} predicts ({error!r})") from error
        print_scores([{"predictions": file} | score for file, score in scores.items()])
        if not s.score:
            common.write_text(f"{s.out}.scores.json", json.dumps(scores[s.out], indent=2))
            if hasattr(task, "dump"):  # where the official scorer does not read JSONL
                task.dump(rows, f"{s.out}.official")
            shutil.rmtree(f"{s.out}.parts")
        summaries = {file: task.summary(score) | ({"failed": len(failed)} if failed else {}) for file, score in scores.items()}
        print(json.dumps(summaries if len(summaries) > 1 else [*summaries.values()][0]))


def predict(s, task):
    """Answer all rows, on all ranks, continuing an interrupted run. -> (rank, finished rows, rows that could not be answered)"""
    from model import DeSTA, opening, torch

    rank, world, device = common.start_processes()
    try:
        options = json.loads(s.options or "{}")
    except ValueError as error:
        raise ValueError(f"--options {s.options!r} is not JSON: {error}") from None
    options = {"text_only": bool(s.text_only), "cot": bool(s.cot), "system": s.system or None} | options
    accepted = inspect.signature(task.load).parameters
    if unknown := [k for k, v in options.items() if v and k not in accepted]:
        raise ValueError(f"--task {s.task} takes no {', '.join(unknown)}")
    rows = task.load(s.data, s.audio_root, **{k: v for k, v in options.items() if k in accepted})
    rows = rows[: s.limit if s.limit >= 0 else None]
    if s.system.endswith(".json"):
        rows = [row | {"messages": [*opening(s.system), *row["messages"][1:]]} for row in rows]
    max_new_tokens = s.max_new_tokens if s.max_new_tokens >= 0 else task.MAX_NEW_TOKENS
    audio_dtype = torch.float32 if s.precision == "official" else None
    ears = (None, None) if s.text_only else (s.whisper, s.adapter)
    model = DeSTA.from_pretrained(s.llm, *ears, device=device, audio_dtype=audio_dtype, long_audio=s.long_audio)
    if rank == 0:
        sampling = f"temperature {s.temperature}, top-p {s.top_p}" if s.temperature else "greedy"
        print(f"{s.task}: {len(rows)} rows, at most {max_new_tokens} new tokens, {sampling}; prompt of the first row:")
        print("".join(f"  {message['role']}: {message['content']}\n" for row in rows[:1] for message in row["messages"]))

    def make(indices):
        run = getattr(task, "answer", None) or (lambda *args, **kwargs: answer(*args, task=task, **kwargs))
        try:
            with torch.no_grad():
                return run(
                    model, [rows[i] for i in indices], max_new_tokens=max_new_tokens, root=s.audio_root,
                    temperature=s.temperature, top_p=s.top_p, batch_size=s.batch_size,
                )  # fmt: skip
        except (ValueError, OSError) as error:  # one bad clip: answer the others one by one
            return [row for i in indices for row in make([i])] if len(indices) > 1 else [{"failed": f"row {indices[0] + 1}: {error}"}]

    stamp = {"settings": dataclasses.asdict(s), "adapter": None if s.text_only else common.file_hash(s.adapter)}
    parts = common.work_in_blocks(len(rows), s.block, f"{s.out}.parts", stamp, rank, world, make)
    finished = [json.loads(line) for part in parts for line in part.open(encoding="utf-8")]
    failed = [row["failed"] for row in finished if "failed" in row]
    finished = [row for row in finished if "failed" not in row]
    common.barrier()  # all ranks have read the parts
    if failed and rank == 0:
        print(f"{len(failed)} of {len(rows)} rows could not be answered and are not scored: {'; '.join(failed[:5])}")
    if rank == 0:
        info = common.run_description(s) | {"adapter_sha256": stamp["adapter"], "failed": failed}
        common.write_text(s.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in finished))
        common.write_text(f"{s.out}.info.json", json.dumps(info, indent=2))
    if not finished:
        shutil.rmtree(f"{s.out}.parts", ignore_errors=True)
        raise ValueError("no row could be answered: is --audio_root right?")
    return rank, finished, failed


def make_judge(s):
    """A local LLM as judge: list of conversations -> list of verdict texts. Greedy, as the official judges are run."""
    from model import DeSTA

    llm = DeSTA.from_pretrained(s.judge, None)

    def judge(conversations):
        return llm.generate(conversations, 512, batch_size=s.batch_size, progress=True)

    judge.name = Path(s.judge).resolve().name
    return judge


if __name__ == "__main__":
    common.run(main)
