"""
eval.py: run a benchmark, write predictions in the form its authors' scorer reads, print the scores
(paper section 5).

    python eval.py                                              # the demo's held-out clips
    python eval.py --task obey --out out/demo/obey.jsonl        # instructions never trained
    torchrun --nproc_per_node=8 eval.py --task mmau --data mmau-test-mini.json \\
        --audio_root DIR --adapter DIR --out P.jsonl
    python eval.py --task mmau --score P.jsonl                  # anybody's predictions: no model
    python eval.py --task mmau --score P.jsonl,COT.jsonl        # side by side, say with --cot 1

Tasks are the files of benchmarks/: what to ask and how to score stands there. The last line printed
is one JSON object.
"""

import hashlib
import importlib
import inspect
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from engine import fast, run
from engine.checkpoint import file_hash, write_json, write_jsonl
from engine.rows import work_in_blocks
from engine.run import setting
from model import LONG, PRECISION, DeSTA, DeSTAConfig, load_to_ask, read_context, with_context
from tokenizer import Tokenizer


@dataclass
class Settings:
    task: str = setting(
        "heldout", "heldout, obey, mmau, sakura, speech_ifeval, voicebench, dynamic_superb"
    )
    data: str = setting(
        "data/demo/test.jsonl", "the benchmark's file or folder; with --score, its labels"
    )
    audio_root: str = setting("data/demo", "folder that its audio paths start from")
    adapter: str = setting("out/demo/adapter", "folder written by train.py, or the released one")
    llm: str = setting("", "Hugging Face folder; '' is the one that the adapter was trained with")
    whisper: str = setting("", "Hugging Face folder; '' as above")
    out: str = setting("out/demo/predictions.jsonl", "predictions; scores go to OUT.scores.json")
    score: str = setting("", "score this file, without a model; several, with commas, side by side")
    judge: str = setting("", "Hugging Face folder of a local LLM in place of the official judge")
    text_only: int = setting(0, "1: the LLM alone answers from the text of the audio", high=1)
    system: str = setting("", "system prompt in place of the benchmark's, or .json of messages")
    cot: int = setting(0, "1: ask for step-by-step reasoning first (our wording)", high=1)
    precision: str = setting("fast", "official: Whisper and adapter in float32", choices=PRECISION)
    long_audio: str = setting(
        "", "beyond the window: cut, split; '' is as trained", choices=("", *LONG)
    )
    max_new_tokens: int = setting(
        -1, "-1: the benchmark's own limit; heldout: the adapter's", low=1, high=100_000
    )
    temperature: float = setting(0.0, "0 is greedy, as in all five benchmarks", high=100)
    top_p: float = setting(1.0, "nucleus sampling, where temperature is not 0", low=1e-6, high=1)
    batch_size: int = setting(32, "rows in flight while generating", low=1)
    block: int = setting(64, "rows saved together; a kill loses no more", low=1)
    limit: int = setting(-1, "only the first so many rows; -1 means all", low=1)
    options: str = setting("", 'more for the task\'s load(), JSON: \'{"subset": "openbookqa"}\'')
    textbook: int = setting(0, "1: compute as GPUs do, on CPUs too: slower", high=1)


# Rows do not depend on these: they may change when a job goes on.
FREE = ("out", "judge", "batch_size")


def answer(model, rows, task, max_new_tokens, root, **options):
    """Default for tasks without an `answer` of their own: one answer per row."""
    answers = model.generate(
        [row["messages"] for row in rows], max_new_tokens, root=root, **options
    )
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
            print(
                "  " * indent
                + f"{name:<{max(1, 36 - 2 * indent)}} "
                + "  ".join(f"{as_text(value):<24}" for value in values).rstrip()
            )


def main():
    s = run.parse_settings(Settings, __doc__)
    files = sorted((Path(__file__).parent / "benchmarks").glob("*.py"))
    tasks = [file.stem for file in files if file.stem not in ("common", "__init__")]
    if s.task not in tasks:
        raise ValueError(f"--task {s.task!r} is none of {', '.join(tasks)}")
    if not s.score and Path(s.out).is_dir():
        raise ValueError(f"--out {s.out!r} is a folder: give a file name")
    task = importlib.import_module(f"benchmarks.{s.task}")
    if s.judge and not hasattr(task, "judge_messages"):
        raise ValueError(f"--task {s.task} is scored by rules alone: it takes no --judge")
    if s.judge:  # a wrong path is found now, not when all answers are there
        Tokenizer(s.judge)
    if s.score:
        files = [s.score] if Path(s.score).exists() else s.score.split(",")
        rank, failed = 0, []
        predictions = {file: task.read_predictions(file) for file in files}
    else:
        rank, rows, failed = predict(s, task)
        predictions = {s.out: rows}
    if rank > 0:
        return
    # With --score, a --data file holds the benchmark's labels: predictions made for another
    # revision are found out.
    labels = {"labels": s.data} if s.score and "data" in s.given else {}
    judge = make_judge(s) if s.judge else None
    try:
        scores = {file: task.score(rows, judge, **labels) for file, rows in predictions.items()}
    except (KeyError, TypeError, AttributeError) as error:
        what = f"what --task {s.task} predicts ({error!r})"
        raise ValueError(f"{' or '.join(predictions)} does not hold {what}") from error
    print_scores([{"predictions": file} | score for file, score in scores.items()])
    if not s.score:
        write_json(f"{s.out}.scores.json", scores[s.out])
        if hasattr(task, "dump"):  # where the official scorer does not read JSONL
            task.dump(rows, f"{s.out}.official")
        shutil.rmtree(f"{s.out}.parts")
    n_failed = {"failed": len(failed)} if failed else {}
    summaries = {file: task.summary(score) | n_failed for file, score in scores.items()}
    print(json.dumps(summaries if len(summaries) > 1 else [*summaries.values()][0]))


def task_options(s, task):
    """What the task's load() is given, by flags and by --options. ValueError where it takes no such
    thing.
    """
    try:
        options = json.loads(s.options or "{}")
    except ValueError as error:
        raise ValueError(f"--options {s.options!r} is not JSON: {error}") from None
    options = {
        "text_only": bool(s.text_only),
        "cot": bool(s.cot),
        "system": s.system or None,
    } | options
    accepted = inspect.signature(task.load).parameters
    if unknown := [name for name, value in options.items() if value and name not in accepted]:
        raise ValueError(f"--task {s.task} takes no {', '.join(unknown)}")
    return {name: value for name, value in options.items() if name in accepted}


def predict(s, task):
    """Answer all rows, on all ranks, continuing an interrupted run. -> (rank, rows, those that
    failed)
    """
    rank, world, device = run.start_processes()
    fast.textbook = bool(s.textbook)
    rows = task.load(s.data, s.audio_root, **task_options(s, task))
    rows = rows[: s.limit if s.limit >= 0 else None]
    if s.system.endswith(".json"):
        context = read_context(s.system)
        rows = [row | {"messages": with_context(row["messages"], context)} for row in rows]
    if s.text_only:
        model = DeSTA.from_pretrained(s.llm or default_llm(s), None, device=device)
    else:
        model = load_to_ask(s, device)
    if s.task in ("heldout", "obey") and not s.system:  # asked as the adapter was trained
        keys, context = ("messages", "wrong_messages"), model.config.context
        asked = lambda row: row | {key: with_context(row[key], context) for key in keys}
        rows = [asked(row) if "wrong_messages" in row else row for row in rows]
    warnings = run.Tally("warnings about audio files")
    model.warn = warnings.add
    limit = next(n for n in (s.max_new_tokens, task_limit(task, model)) if n > 0)
    if rank == 0:
        sampling = f"temperature {s.temperature}, top-p {s.top_p}" if s.temperature else "greedy"
        print(f"{s.task}: {len(rows)} rows, at most {limit} new tokens, {sampling}; first prompt:")
        for message in rows[0]["messages"] if rows else ():
            print(f"  {message['role']}: {message['content']}")
        print()
    one_each = lambda model, rows, **options: answer(model, rows, task, **options)
    ask = getattr(task, "answer", one_each)
    options = dict(max_new_tokens=limit, root=s.audio_root, batch_size=s.batch_size)
    options |= dict(temperature=s.temperature, top_p=s.top_p)

    @torch.no_grad()
    def make(indices):
        try:
            return ask(model, [rows[i] for i in indices], **options)
        except (ValueError, OSError):  # one bad clip: answer the others one by one
            made = []
        for i in indices:
            try:
                made += ask(model, [rows[i]], **options)
            except (ValueError, OSError) as error:
                made.append({"failed": f"row {i + 1}: {error}"})
        return made

    content = json.dumps(rows, sort_keys=True, default=str).encode()
    stamp = {
        "settings": {k: v for k, v in asdict(s).items() if k not in FREE},
        "rows": hashlib.sha256(content).hexdigest(),
        "adapter": None if s.text_only else file_hash(s.adapter),
    }
    parts = work_in_blocks(len(rows), s.block, f"{s.out}.parts", stamp, rank, world, make)
    finished = [json.loads(line) for part in parts for line in part.open(encoding="utf-8")]
    failed = [row["failed"] for row in finished if "failed" in row]
    finished = [row for row in finished if "failed" not in row]
    warnings.close()  # a barrier too: all ranks have read the parts
    if rank == 0:
        if failed:
            what = f"{len(failed)} of {len(rows)} rows could not be answered and are not scored"
            print(f"{what}: {'; '.join(failed[:5])}")
        write_jsonl(s.out, finished)
        info = {"adapter_sha256": stamp["adapter"], "failed": failed}
        write_json(f"{s.out}.info.json", run.description(s) | info)
    if not finished:
        shutil.rmtree(f"{s.out}.parts", ignore_errors=True)
        raise ValueError("no row could be answered: is --audio_root right?")
    return rank, finished, failed


def task_limit(task, model):
    """The five benchmarks have official limits; the held-out rows are answered as the adapter was
    trained.
    """
    if task.__name__.endswith("heldout") and model.config.max_answer_tokens > 0:
        return model.config.max_answer_tokens
    return task.MAX_NEW_TOKENS


def default_llm(s):
    """The LLM that the adapter was trained with; the demo's where there is no adapter."""
    has_adapter = (Path(s.adapter) / "config.json").is_file()
    return (
        DeSTAConfig.from_adapter(s.adapter).llm if has_adapter else "weights/smollm2-135m-instruct"
    )


def make_judge(s):
    """A local LLM as judge: list of conversations -> list of verdict texts. Greedy, as the official
    judges are run.
    """
    llm = DeSTA.from_pretrained(s.judge, None)

    def judge(conversations):
        return llm.generate(conversations, 512, batch_size=s.batch_size, progress=True)

    judge.name = Path(s.judge).resolve().name
    return judge


if __name__ == "__main__":
    run.main(main)
