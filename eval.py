"""
eval.py: run a benchmark, write predictions in the form its authors' scorer reads, print the scores (paper section 5).

    python eval.py                                                      # the demo's held-out clips
    torchrun --nproc_per_node=8 eval.py --task mmau --data mmau-test-mini.json --audio_root DIR --llm DIR --whisper DIR --adapter DIR --out P.jsonl
    python eval.py --task mmau --score P.jsonl                          # score anybody's predictions: no model needed

Tasks are the files of benchmarks/: what to ask and how to score stands there. The last line printed is one JSON object.
"""

import dataclasses
import importlib
import inspect
import json
import shutil
import sys
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
    score: str = setting("", "score this predictions file, without a model")
    judge: str = setting("", "Hugging Face folder of a local LLM that stands in for the official judge")
    text_only: int = setting(0, "1: the backbone answers from the benchmark's text, without audio (Speech-IFEval's reference)")
    system: str = setting("", "system prompt instead of the benchmark's own")
    cot: int = setting(0, "1: ask for step-by-step reasoning before the answer")
    precision: str = setting("fast", "official: Whisper and Q-Former in float32")
    long_audio: str = setting("", "cut or split: whether more than the adapter's window is heard; '' means as it was trained")
    max_new_tokens: int = setting(-1, "-1 means the benchmark's own limit")
    temperature: float = setting(0.0, "0 is greedy, as in all five benchmarks")
    top_p: float = setting(1.0, "nucleus sampling, where temperature is not 0")
    batch_size: int = setting(32, "rows in flight while generating")
    block: int = setting(64, "rows saved together; at most this many are lost by a kill")
    limit: int = setting(-1, "only the first so many rows; -1 means all")
    options: str = setting("", "more for the task's load(), as JSON, e.g. '{\"subset\": \"openbookqa\"}'")


def answer(model, rows, task, max_new_tokens, root, **options):
    """Default for tasks without an `answer` of their own: one answer per row."""
    answers = model.generate([row["messages"] for row in rows], max_new_tokens, root=root, **options)
    return [task.with_answer(row, text) for row, text in zip(rows, answers)]


def print_scores(scores, indent=0):
    """Nested dicts as an indented list; lists of three numbers are a value and its 95 % interval."""
    for name, value in scores.items():
        if isinstance(value, dict):
            print("  " * indent + str(name))
            print_scores(value, indent + 1)
        else:
            if isinstance(value, list) and len(value) == 3 and all(isinstance(x, float) for x in value):
                value = "{:.3f}  [{:.3f}, {:.3f}]".format(*value)
            print("  " * indent + f"{name:<{max(1, 36 - 2 * indent)}} {value}")


def main():
    s = common.parse_settings(Settings, __doc__)
    tasks = sorted(file.stem for file in (Path(__file__).parent / "benchmarks").glob("*.py") if file.stem not in ("common", "__init__"))
    if s.task not in tasks:
        raise ValueError(f"--task {s.task!r} is none of {', '.join(tasks)}")
    task = importlib.import_module(f"benchmarks.{s.task}")
    if s.score:
        rank, rows = 0, task.read_predictions(s.score)
    else:
        rank, rows = predict(s, task)
    if rank == 0:
        # With --score, a --data file holds the benchmark's labels: predictions made for another revision are found out.
        labels = {"labels": s.data} if s.score and s.data != Settings.data else {}
        scores = task.score(rows, make_judge(s) if s.judge else None, **labels)
        print_scores(scores)
        if not s.score:
            common.write_text(f"{s.out}.scores.json", json.dumps(scores, indent=2))
            if hasattr(task, "dump"):  # where the official scorer does not read JSONL
                task.dump(rows, f"{s.out}.official")
        print(json.dumps(task.summary(scores)))


def predict(s, task):
    """Answer all rows, on all ranks, continuing an interrupted run. -> (rank, finished rows)"""
    from model import DeSTA, torch

    rank, world, device = common.start_processes()
    try:
        options = json.loads(s.options or "{}")
    except ValueError as error:
        raise ValueError(f"--options {s.options!r} is not JSON: {error}") from None
    options = {"text_only": bool(s.text_only), "cot": bool(s.cot), "system": s.system or None} | options
    accepted = inspect.signature(task.load).parameters
    if "_" not in accepted and (unknown := [k for k, v in options.items() if v and k not in accepted]):
        raise ValueError(f"--task {s.task} takes no {', '.join(unknown)}")
    rows = task.load(s.data, s.audio_root, **{k: v for k, v in options.items() if k in accepted})
    rows = rows[: s.limit if s.limit >= 0 else None]
    max_new_tokens = s.max_new_tokens if s.max_new_tokens >= 0 else task.MAX_NEW_TOKENS
    audio_dtype = torch.float32 if s.precision == "official" else None
    model = DeSTA.from_pretrained(s.llm, s.whisper, s.adapter, device=device, audio_dtype=audio_dtype, long_audio=s.long_audio)
    if rank == 0:
        system = s.system or getattr(task, "SYSTEM", "that of each row")
        print(f"{s.task}: {len(rows)} rows, at most {max_new_tokens} new tokens, temperature {s.temperature}, system prompt: {system}")

    def make(indices):
        with torch.no_grad():
            run = getattr(task, "answer", None) or (lambda *args, **kwargs: answer(*args, task=task, **kwargs))
            return run(
                model, [rows[i] for i in indices], max_new_tokens=max_new_tokens, root=s.audio_root,
                temperature=s.temperature, top_p=s.top_p, batch_size=s.batch_size,
            )  # fmt: skip

    stamp = {"settings": dataclasses.asdict(s), "adapter": common.file_hash(s.adapter)}
    parts = common.work_in_blocks(len(rows), s.block, f"{s.out}.parts", stamp, rank, world, make)
    finished = [json.loads(line) for part in parts for line in part.open(encoding="utf-8")]
    if rank == 0:
        common.write_text(s.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in finished))
        common.write_text(f"{s.out}.info.json", json.dumps(common.run_description(s) | {"adapter_sha256": stamp["adapter"]}, indent=2))
    common.barrier()
    if rank == 0:
        shutil.rmtree(f"{s.out}.parts")
    return rank, finished


def make_judge(s):
    """A local LLM as judge: list of conversations -> list of verdict texts. Greedy, as the official judges are run."""
    from llama import Llama, generate
    from model import compute_dtype, default_device
    from tokenizer import Tokenizer

    tokenizer = Tokenizer(s.judge)
    judge = Llama.from_pretrained(s.judge, compute_dtype(default_device()), default_device())

    def ask(conversations):
        prompts = [tokenizer.encode(tokenizer.apply_chat_template(messages)) for messages in conversations]
        answers = generate(judge, prompts, 512, stop_ids=tokenizer.stop_ids, batch_size=s.batch_size, progress=True)
        return [tokenizer.decode(ids).strip() for ids in answers]

    return ask


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError, ImportError) as error:
        common.fail(error)
    except KeyboardInterrupt:
        sys.exit("interrupted: finished rows are kept, the same command continues")
