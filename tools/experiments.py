"""
experiments.py: the paper's claims, tried at a size that anybody can run (docs/experiments.md).

    python tools/experiments.py run                              # what has no line yet: half a day
    python tools/experiments.py run --claims 1,2 --minutes 60    # begins no run after an hour
    python tools/experiments.py run --quick 1                    # claim 1, reduced to minutes
    python tools/experiments.py tables                           # into docs/experiments.md, assets/

The table RUNS says what is run. A run lets generate_data.py make its targets, unless another run
did, train.py train, eval.py evaluate, and appends a line to assets/experiments/claimN.jsonl:
settings, seed, commit, results. Ctrl-C or a kill at any point: the same command goes on.
Two runs at a time, with one thread each, use two cores best.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from benchmarks import heldout, mmau, obey
from benchmarks.common import read_rows
from engine.checkpoint import write_json, write_jsonl, write_text
from engine.run import argument, main, parse_settings, setting

# -- the experiments, as data ----------------------------------------------------------------------

SMOLLM2, QWEN = "weights/smollm2-135m-instruct", "weights/qwen2.5-coder-0.5b-instruct"
POOL = ROOT / "demo/instructions.prose"  # those that SmolLM2 answers with the attributes (LOG.md)
# Held out in every run: clips of these classes, and every third instruction.
NEW_CLASSES = {
    "Sound": ("helicopter", "church bell", "dog barking"),
    "Instrument": ("violin", "xylophone"),
    "Language": ("Polish",),
}
INSTRUCTIONS = {  # folders, made of POOL's lines
    "pool": lambda lines: [line for i, line in enumerate(lines) if i % 3 != 2],
    "new": lambda lines: lines[2::3],
    "one": lambda lines: ["What do you hear?"],
    "none": lambda lines: [],
}


def template(row):
    """The labels in a fixed form, whatever the question: "The sound is rain. The volume is loud." """
    facts = re.search(r"\(([^()]*)\)$", row["seed_description"])[1].split(", ")
    pairs = (fact.split(": ") for fact in facts)
    answer = " ".join(f"The {name.lower()} is {value}." for name, value in pairs)
    return {key: row[key] for key in row if key != "truncated"} | {"response": answer}


def without(domain):
    return lambda row: None if row["dataset"] == f"demo-{domain}" else row


# Training targets: flags of generate_data.py; or another set, and what is made of each of its rows.
TARGETS = {
    "self": {},
    "qwen": {"llm": QWEN},
    "self_t1": {"temperature": 1.0},
    "labels": ("self", template),
    "one_instruction": {"instructions": "one"},
    "no_instruction": {"instructions": "none"},
    "no_speech": ("self", without("speech")),
    "no_sound": ("self", without("sound")),
    "no_music": ("self", without("music")),
}
# demo/context.json holds worked answers, which every backbone copies: all targets would be alike.
GENERATE = dict(system=ROOT / "demo/context.prose.json", max_new_tokens=48, keep_truncated=1)
TRAIN = dict(
    lr=5e-4, max_steps=300, eval_every=60, eval_rows=24, save_every=50, keep=1, max_answer_tokens=64
)
LORA = dict(lora_rank=16, llm_lr=2e-4)
ALL = dict(train_llm=1, llm_lr=2e-5, max_steps=120)  # 6.5 s a step in float32: at most 15 minutes
FEWER = dict(max_steps=250)  # Qwen takes longer: at most 15 minutes

NAMING, STANDARD = ("seen", "new"), ("targets", "seen", "new", "obey")
FORGETTING, CHOICE = ("seen", "obey", "text"), ("mmau", "cot", "mmau_text", "cot_text")
# claim, name, LLM, targets, flags of train.py, tests. The first of a claim and an LLM is what the
# others are compared with. What several claims share is trained and tested once.
SEEDS = 3
RUNS = [
    (1, "SmolLM2: own", SMOLLM2, "self", {}, STANDARD),
    (1, "SmolLM2: by Qwen", SMOLLM2, "qwen", {}, STANDARD),
    (1, "SmolLM2: label templates", SMOLLM2, "labels", {}, STANDARD),
    (1, "SmolLM2: own, T 1", SMOLLM2, "self_t1", {}, STANDARD),
    (1, "Qwen: own", QWEN, "qwen", FEWER, STANDARD),
    (1, "Qwen: by SmolLM2", QWEN, "self", FEWER, STANDARD),
    (2, "adapter, own", SMOLLM2, "self", {}, FORGETTING),
    (2, "adapter, labels", SMOLLM2, "labels", {}, FORGETTING),
    (2, "LoRA, own", SMOLLM2, "self", LORA, FORGETTING),
    (2, "LoRA, labels", SMOLLM2, "labels", LORA, FORGETTING),
    (2, "all weights, own", SMOLLM2, "self", ALL, FORGETTING),
    (2, "all weights, labels", SMOLLM2, "labels", ALL, FORGETTING),
    (6, "pool", SMOLLM2, "self", {}, STANDARD),
    (6, "one instruction", SMOLLM2, "one_instruction", {}, STANDARD),
    (6, "no instruction", SMOLLM2, "no_instruction", {}, STANDARD),
    (3, "all domains", SMOLLM2, "self", {}, NAMING),
    (3, "no speech", SMOLLM2, "no_speech", {}, NAMING),
    (3, "no sound", SMOLLM2, "no_sound", {}, NAMING),
    (3, "no music", SMOLLM2, "no_music", {}, NAMING),
    (4, "four taps, 16 queries", SMOLLM2, "self", {}, ("seen", "vectors")),
    (4, "last tap alone", SMOLLM2, "self", dict(n_taps=1), ("seen", "vectors")),
    (4, "8 queries", SMOLLM2, "self", dict(n_queries=8), ("seen", "vectors")),
    (4, "32 queries", SMOLLM2, "self", dict(n_queries=32), ("seen", "vectors")),
    (5, "SmolLM2", SMOLLM2, "self", {}, CHOICE),
    (5, "Qwen", QWEN, "qwen", FEWER, CHOICE),
]
ORDER = (1, 2, 6, 3, 4, 5)


@dataclass
class Run:
    claim: int
    name: str
    llm: str
    targets: str
    train: dict
    tests: tuple
    seed: int

    @property
    def key(self):
        """What is trained, as a folder's name: runs of several claims may have it in common."""
        settings = {"max_steps": TRAIN["max_steps"]} | self.train
        settings = [f"{name}_{value}" for name, value in sorted(settings.items())]
        return "-".join([short(self.llm), self.targets, *settings, f"seed_{self.seed}"])


def short(llm):
    return "qwen" if llm == QWEN else "smollm2"


def all_runs(claims=ORDER):
    """In the order in which they are done. Seed after seed, so that a claim's arms grow alike."""
    for claim in claims:
        for seed in range(SEEDS):
            yield from (Run(*row, seed) for row in RUNS if row[0] == claim)


# -- what predictions say --------------------------------------------------------------------------
# A figure is a number, or a list with one for each clip (of instructions obeyed: for each
# instruction), the same in the same order in every run: what is listed depends on labels and
# instructions alone.


def is_new(name, value):
    return value in NEW_CLASSES.get(name, ())


def named(rows, way, wanted):
    """For each row with wanted attributes, the share of those that its answer names.

    wanted: row -> names of attributes.
    """
    values = {}
    for row in rows:
        for name, value in row["attributes"].items():
            values.setdefault((row["domain"], name), set()).add(value)
    shares = []
    for row in rows:
        said, labels = row["answers"][way], row["attributes"]
        hits = [
            heldout.is_named(said, labels[name], values[row["domain"], name])
            for name in wanted(row)
        ]
        shares += [round(sum(hits) / len(hits), 3)] if hits else []
    return shares


def by_chance(rows, wanted):
    """For each clip, how much of it the answers to the other clips of its domain name."""
    shares = []
    for domain in dict.fromkeys(row["domain"] for row in rows):
        mine = [row for row in rows if row["domain"] == domain]
        answers = [row["answers"] for row in mine]
        found = []
        for k in range(1, len(mine)):
            others = zip(mine, answers[k:] + answers[:k])
            found.append(
                named([row | {"answers": other} for row, other in others], "right", wanted)
            )
        shares += [round(sum(of_clip) / len(of_clip), 3) for of_clip in zip(*found)]
    return shares


def naming(rows):
    """Clips of held-out classes count as "new class" alone, by the attribute that makes them so."""
    new = lambda row: [name for name, value in row["attributes"].items() if is_new(name, value)]
    seen = lambda row: [] if new(row) else list(row["attributes"])
    figures = {}
    for way in rows[0]["answers"]:
        figures |= {way: named(rows, way, seen), f"{way}, new class": named(rows, way, new)}
        for domain in ("speech", "sound", "music"):
            mine = [row for row in rows if row["domain"] == domain]
            figures[f"{way}, {domain}"] = named(mine, way, seen)
    if "right" in figures:
        figures["chance"] = by_chance(rows, seen)
    tokens = sum(row["target_tokens"] for row in rows)
    for way in rows[0]["loss"]:
        figures[f"loss {way}"] = sum(row["loss"][way] for row in rows) / tokens
    return figures


def target_figures(rows):
    """How surprising targets are to the LLM that reads the description, and what they name."""
    tokens = sum(row["target_tokens"] for row in rows)
    loss = sum(row["loss"]["description"] for row in rows) / tokens
    names = mean(named(rows, "text", lambda row: list(row["attributes"])))
    return {"perplexity": math.exp(loss), "names": names, "tokens": tokens / len(rows)}


def obeyed(rows):
    """For each instruction, the share of its clips with which it is obeyed: 180 pairs are 60
    instructions, and an interval has to say something about others.
    """
    figures = {}
    for way in rows[0]["answers"]:
        verdicts = [obey.obeys(row, row["answers"][way]) for row in rows]
        if None in verdicts:
            needed = "pip install -r benchmarks/requirements.txt"
            raise ValueError(f"rules about languages need langdetect: {needed}")
        figures[way] = of_each_instruction(rows, verdicts)
    if "sound" in figures:
        figures["unasked"] = of_each_instruction(rows, obey.unasked(rows, "sound"))
        pairs = zip(figures["sound"], figures["description"])
        figures["delta"] = [round(sound - description, 3) for sound, description in pairs]
    return figures


def of_each_instruction(rows, values):
    found = {}
    for row, value in zip(rows, values):
        found.setdefault(row["instruction"], []).append(value)
    return [round(mean(of_one), 3) for of_one in found.values()]


def chosen(rows):
    """Multiple choice: the right one, and whether one of the choices was named at all."""
    said = lambda row, choice: mmau.is_right(row["model_prediction"], choice, row["choices"])
    return {
        "accuracy": [int(said(row, row["answer"])) for row in rows],
        "parsed": [int(any(said(row, choice) for choice in row["choices"])) for row in rows],
        "chance": sum(1 / len(row["choices"]) for row in rows) / len(rows),
    }


def mean(figure):
    return sum(figure) / len(figure) if isinstance(figure, list) else figure


def text_loss(adapter):
    """Of English prose that has to do with no clip: the manual that every Python holds. -> losses
    of 64 pieces of 256 tokens, by the LLM of the adapter, with what the adapter's file changed in it
    """
    from pydoc_data.topics import topics

    import torch
    import torch.nn.functional as F

    from model import DeSTA, DeSTAConfig

    saved = DeSTAConfig.from_adapter(adapter)
    model = DeSTA.from_pretrained(saved.llm, saved.whisper, adapter)
    text, losses = "\n\n".join(topics[name] for name in sorted(topics)), []
    ids = torch.tensor(model.tokenizer.encode(text, special=False)[: 64 * 256])
    with torch.inference_mode():
        for piece in ids.view(64, 256):
            logits = model.llm(piece[None])[0, :-1].float()  # (255, vocab_size)
            losses.append(round(F.cross_entropy(logits, piece[1:]).item(), 4))
    return losses


# -- doing a run -----------------------------------------------------------------------------------


class Workplace:
    """Where everything lies. Each method makes what it returns, unless it is there."""

    def __init__(self, clips="data/demo", quick=False):
        name = "experiments.quick" if quick else "experiments"
        self.clips, self.data, self.out = Path(clips), Path("data") / name, Path("out") / name
        self.lines = self.out if quick else Path("assets/experiments")
        self.generate, self.train, self.n_clips = GENERATE, {}, {}
        self.n_targets, self.pairs = 160, 180
        if quick:
            self.generate = GENERATE | dict(max_new_tokens=16)
            self.train = dict(max_steps=3, eval_every=3, eval_rows=4, standardize=8)
            self.n_clips = dict(train=24, test=9)
            self.n_targets = self.pairs = 6
        self.locks, self.children, self.stopped = {}, set(), False
        self.appending = threading.Lock()

    def once(self, path, make):
        """Make a file unless it is there; of two threads, the second waits. -> path"""
        with self.locks.setdefault(str(path), threading.Lock()):
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                make(path)
        return path

    def call(self, log, script, **flags):
        """Run a script of the repository. ValueError with its last line where it fails."""
        if self.stopped:  # while this run waited for another one's file
            raise ValueError(f"{script} was not begun")
        given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as file:
            name, *words = script.split()
            command = [sys.executable, ROOT / name, *words, *given]
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
            child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=one_thread)
            self.children.add(child)
        status = child.wait()
        self.children.remove(child)
        if status or self.stopped:
            said = log.read_text(errors="replace").split("\n")
            last = [line for line in said if line.strip()][-1:]
            raise ValueError(f"{script} ended with status {status}, see {log}: {''.join(last)}")

    def stop(self):
        self.stopped = True
        for child in list(self.children):
            child.terminate()

    # clips, instructions, targets

    def metadata(self, split):
        def write(path):
            rows = read_rows(self.clips / f"{split}.metadata.jsonl")
            labels = lambda row: row["segments"][0]["attributes"].items()
            if split == "train":
                rows = [row for row in rows if not any(is_new(*label) for label in labels(row))]
            write_jsonl(path, rows[: self.n_clips.get(split)])

        return self.once(self.data / f"{split}.metadata.jsonl", write)

    def instructions(self, name):
        folder = self.data / "instructions" / name
        for file in sorted(POOL.glob("*.txt")):
            lines = INSTRUCTIONS[name](file.read_text(encoding="utf-8").splitlines())
            text = "".join(f"{line}\n" for line in lines)
            self.once(folder / file.name, lambda path, text=text: write_text(path, text))
        return folder

    def rows(self, name, split, llm=SMOLLM2, instructions="pool", **flags):
        """A file of rows by generate_data.py."""
        flags |= self.generate | flags
        flags |= dict(llm=llm, audio_root=self.clips, metadata=self.metadata(split))
        flags["instructions"], log = self.instructions(instructions), self.out / f"{name}.log"
        # heldout.py looks for labels beside the rows
        labels = self.data / f"{name}.metadata.jsonl"
        self.once(labels, lambda path: write_text(path, self.metadata(split).read_text()))
        make = lambda path: self.call(log, "generate_data.py", out=path, **flags)
        return self.once(self.data / f"{name}.jsonl", make)

    def targets(self, name):
        if isinstance(TARGETS[name], dict):
            return self.rows(name, "train", **TARGETS[name])
        source, change = TARGETS[name]
        labels = self.data / f"{name}.metadata.jsonl"
        self.once(labels, lambda path: write_text(path, self.metadata("train").read_text()))
        changed = lambda: filter(None, map(change, read_rows(self.targets(source))))
        return self.once(self.data / f"{name}.jsonl", lambda path: write_jsonl(path, changed()))

    def held_out(self, llm, test):
        """The held-out clips, asked with the training pool's instructions or with new ones."""
        which, pool = ("new", "new") if test == "new" else ("seen", "pool")
        return self.rows(f"{short(llm)}.{which}", "test", llm, pool)

    # training, tests

    def adapter(self, run):
        out, flags = self.out / run.key, TRAIN | run.train | self.train

        def train(done):
            files = dict(data=self.targets(run.targets), eval_data=self.held_out(run.llm, "seen"))
            settings = dict(llm=run.llm, audio_root=self.clips, seed=run.seed, out=out)
            self.call(self.out / f"{run.key}.log", "train.py", **settings, **files, **flags)
            last = read_rows(out / "log.jsonl")[-1]
            if last["step"] < flags["max_steps"]:
                raise ValueError(f"{out} was stopped at step {last['step']}")
            shutil.rmtree(out / "checkpoints")  # with --train_llm 2 GB
            done.touch()

        self.once(out / "done", train)
        return out / "adapter"

    def test(self, run, test):
        """-> {figure: a number, or one for each clip}"""
        folder, task, flags, options = self.out / run.key, "heldout", {}, {}
        # What the LLM says that reads the description: where it is frozen, the same in all runs.
        shared = self.out / f"{short(run.llm)}-text"
        frozen = not {"lora_rank", "train_llm"} & set(run.train)
        if test == "targets":  # of a set and an LLM, whatever was trained
            folder = self.out / f"{short(run.llm)}-{run.targets}-targets"
            data, read = self.targets(run.targets), target_figures
            flags, options = dict(limit=self.n_targets), dict(ways="description")
        elif test in ("seen", "new", "vectors"):
            data, read = self.held_out(run.llm, test), naming
            options = dict(ways="vectors" if test == "vectors" else "right,description")
        elif test in ("obey", "text"):
            data, read, task = self.held_out(run.llm, "seen"), obeyed, "obey"
            options = dict(asked="text")
            if test == "obey":
                options = dict(pairs=self.pairs, ways="sound" if frozen else "description,sound")
            flags = dict(max_new_tokens=80)  # the longest instruction asks for 40 words
        else:
            log, clips = self.out / "mmau.log", self.metadata("test")
            make = lambda path: self.call(log, "demo/mmau.py", out=path, metadata=clips)
            data, read, task = self.once(self.data / "mmau.json", make), chosen, "mmau"
            flags = dict(cot=int("cot" in test), max_new_tokens=128 if "cot" in test else 32)
            if "text" in test:
                folder, flags["text_only"] = shared, 1
        adapter = self.adapter(run)
        flags |= dict(task=task, data=data, audio_root=self.clips, adapter=adapter)

        def ask(folder, options):
            log, given = folder / f"{test}.log", flags | dict(options=json.dumps(options))
            make = lambda path: self.call(log, "eval.py", out=path, **given)
            return read_rows(self.once(folder / f"{test}.jsonl", make))

        rows = ask(folder, options)
        if test == "obey" and frozen:
            for row, described in zip(rows, ask(shared, options | dict(ways="description"))):
                row["answers"] |= described["answers"]
        figures = read(rows)
        if test == "text":
            log, this = folder / "text_loss.log", "tools/experiments.py text_loss"
            make = lambda path: self.call(log, this, out=path, adapter=adapter)
            [found] = read_rows(self.once(folder / "text_loss.json", make))
            figures["text loss"] = found["losses"]
        return figures

    # lines

    def file(self, claim):
        return self.lines / f"claim{claim}.jsonl"

    def results(self, claims=ORDER):
        """The lines of all finished runs; a line that a kill has torn is left out."""
        files = [self.file(claim) for claim in claims if self.file(claim).exists()]
        lines = [line for file in files for line in file.read_text().split("\n")]
        return [json.loads(line) for line in lines if line.endswith("}")]

    def do(self, run):
        """One run and its line. What an equal run of another claim found is taken from its line."""
        start, known, made = time.time(), {}, {}
        for line in self.results():
            if line["key"] == run.key:
                made = {key: line[key] for key in ("commit", "tap_weights")}
                known |= line["results"]
        find = lambda test: known[test] if test in known else self.test(run, test)
        results = {test: find(test) for test in run.tests}
        if not made:
            [told] = read_rows(self.out / run.key / "run.json")
            log = read_rows(self.out / run.key / "log.jsonl")
            weights = {r["step"]: r["tap_weights"] for r in log if "tap_weights" in r}
            made = {"commit": told["git"], "tap_weights": weights}
        line = dict(claim=run.claim, name=run.name, seed=run.seed, llm=run.llm, targets=run.targets)
        line |= dict(train=TRAIN | run.train | self.train, key=run.key, **made)
        line |= dict(seconds=round(time.time() - start), results=results)
        file = self.file(run.claim)
        with self.appending, open(file, "a+") as lines:
            lines.seek(0)
            torn = not ("\n" + lines.read()).endswith("\n")  # by a kill
            lines.write("\n" * torn + json.dumps(line, separators=(",", ":")) + "\n")

    def do_all(self, runs, minutes, at_once):
        """-> how many failed"""
        done = {(line["claim"], line["key"]) for line in self.results()}
        todo = [run for run in runs if (run.claim, run.key) not in done]
        print(f"{len(todo)} runs to do, {len(runs) - len(todo)} done")
        self.lines.mkdir(parents=True, exist_ok=True)
        deadline, failed = time.time() + 60 * minutes, []

        def attempt(run):
            what = f"claim {run.claim}, {run.name}, seed {run.seed}"
            if self.stopped or minutes >= 0 and time.time() > deadline:
                return
            start = time.time()
            try:
                self.do(run)
                print(f"{what}: {(time.time() - start) / 60:.1f} min", flush=True)
            except (ValueError, OSError) as error:
                failed.append(run)
                print(f"{what}: {error}", file=sys.stderr, flush=True)

        with ThreadPoolExecutor(at_once) as pool:
            futures = [pool.submit(attempt, run) for run in todo]
            try:
                for future in futures:
                    future.result()
            except BaseException:  # Ctrl-C, SIGTERM
                self.stop()
                raise
        return len(failed)


# --------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    what: str = argument("run, or tables")
    claims: str = setting("1,2,6,3,4,5", "the claims to run, in this order")
    minutes: float = setting(-1.0, "begin no run after so many; -1: no limit")
    at_once: int = setting(2, "runs at a time, one thread each", low=1, high=1000)
    clips: str = setting("data/demo", "labelled clips: a --data_dir of demo/prepare.py")
    quick: int = setting(0, "1: two runs of claim 1 in minutes, to see that it works", high=1)
    adapter: str = setting("", "text_loss: the adapter whose LLM is tried")
    out: str = setting("", "text_loss: the file to write")


def script():
    s = parse_settings(Settings, __doc__)
    place = Workplace(s.clips, s.quick)
    if s.what == "text_loss":  # for `run`, in a process of its own
        return write_json(s.out, {"losses": text_loss(s.adapter)})
    if s.what == "tables":
        import experiment_tables

        return experiment_tables.write(place.results(), Path("docs/experiments.md"), Path("assets"))
    if s.what != "run":
        raise ValueError(f"{s.what!r} is neither run nor tables")
    claims = [claim.strip() for claim in s.claims.split(",")]
    if set(claims) - set(map(str, ORDER)):
        raise ValueError(f"--claims {s.claims!r}: give some of 1 to 6, with commas")
    runs = list(all_runs(dict.fromkeys(map(int, claims))))
    if s.quick:
        runs = [run for run in runs if run.claim == 1 and run.targets in ("self", "labels")]
        runs = [run for run in runs if run.llm == SMOLLM2 and run.seed == 0]
    if failed := place.do_all(runs, s.minutes, s.at_once):
        raise ValueError(f"{failed} runs failed, see above; the same command tries them again")


if __name__ == "__main__":
    main(script)
