"""
generate_data.py: let the frozen LLM write its own training targets (paper section 3.1).

This is the part that the authors did not release:
    metadata row -> description "[00:00-00:05] Hello world (Gender: female)"
    -> an instruction, drawn from the pool of the clip's domain
    -> what the LLM answers to description + instruction, at temperature 0.05 -> a training row

    python generate_data.py                                     # the demo
    torchrun --nproc_per_node=8 generate_data.py --recipe paper --llm DIR --whisper DIR \\
        --metadata F.jsonl --audio_root DIR --instructions DIR --out F.jsonl

Rows are made in blocks; a finished block is one file in OUT.parts/. A killed job continues where it
stopped, on any number of processes, and ends with the same rows: a block's result depends on its
rows and the seed alone.

The answers may also come from another engine (vLLM, TensorRT-LLM, an API), which is what they are
made for. The same command with --export prompts.jsonl writes one line per row, {"id", "clip",
"prompt", "prompt_token_ids"}, and needs neither audio nor weights; prompts.jsonl.info.json holds
the sampling settings. The engine's answers, in any order, are lines of {"id", "text" or
"token_ids", "finish_reason"}: "stop" for a whole answer, "length" for a cut one. The same command
with --answers answers.jsonl goes on as if it had made them.
"""

import contextlib
import itertools
import json
import random
import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from engine import run
from engine.answers import Answers, prompt_id
from engine.checkpoint import file_hash, write_atomically, write_json
from engine.rows import JsonLines, work_in_blocks
from engine.run import compute_dtype, setting
from engine.weights import read_json
from llama import Llama, generate
from model import (
    AUDIO,
    END,
    LONG,
    START,
    DeSTAConfig,
    audio_windows,
    build_prompt,
    description_slot,
    inherit,
    read_context,
    transcribe_windows,
)
from recipes import GENERATE_DATA
from tokenizer import Tokenizer
from whisper import Whisper


@dataclass
class Settings:
    recipe: str = setting("demo", "column of recipes.py for what no flag gives: demo or paper")
    llm: str = setting("weights/smollm2-135m-instruct", "Hugging Face folder: the LLM of train.py")
    whisper: str = setting("weights/whisper-tiny.en", "Hugging Face folder, for transcripts")
    metadata: str = setting(
        "data/demo/train.metadata.jsonl", "clips, their segments and attributes"
    )
    audio_root: str = setting("data/demo", "folder that the ids of the metadata start from")
    out: str = setting("data/demo/train.jsonl", "training rows to write")
    init_from: str = setting("", "adapter to go on from: its models, context, window, limit")
    instructions: str = setting(GENERATE_DATA["instructions"], "folder of DOMAIN.txt")
    system: str = setting(GENERATE_DATA["system"], "system prompt, or .json of messages")
    per_clip: int = setting(1, "instructions drawn for each clip", low=1, high=1000)
    temperature: float = setting(GENERATE_DATA["temperature"], "of the answers", high=100)
    top_p: float = setting(GENERATE_DATA["top_p"], "of the answers", low=1e-6, high=1)
    max_new_tokens: int = setting(
        GENERATE_DATA["max_new_tokens"], "answers are cut here", low=1, high=100_000
    )
    max_description: int = setting(
        1000, "tokens; clips with a longer description are left out", low=1
    )
    keep_truncated: int = setting(0, "1: keep cut answers, marked as such", high=1)
    batch_size: int = setting(GENERATE_DATA["batch_size"], "rows in flight while generating", low=1)
    block: int = setting(GENERATE_DATA["block"], "rows saved together; a kill loses no more", low=1)
    audio_seconds: int = setting(
        GENERATE_DATA["audio_seconds"], "window of a clip, for the transcript", low=1, high=30
    )
    long_audio: str = setting(
        "cut", "rest of longer clips: cut, or split (transcribed)", choices=LONG
    )
    limit: int = setting(-1, "only the first so many clips; -1 means all", low=1)
    ahead: int = setting(
        -1, "1: hear the next block while the LLM answers this one; -1: on GPUs", high=1
    )
    export: str = setting("", "write the prompts to this file, for another engine, and stop")
    answers: str = setting("", "file of another engine's answers to them; no LLM is loaded")
    seed: int = setting(0, "of the drawn instructions and of sampling")


# -- a clip in words -------------------------------------------------------------------------------


def clock(seconds):
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


def describe(segments):
    """One line per segment: "[00:00-00:05] Hello world (Gender: female, Pitch: high)".

    An attribute without a name, a caption say, stands alone: "[00:00-00:10] (A dog barks.)".
    """
    lines = []
    for segment in segments:
        start, end = segment["start"], segment["end"]
        if not 0 <= start <= end:
            raise ValueError(f"a segment from {start} to {end} s")
        attributes = segment.get("attributes", {}).items()
        facts = ", ".join(f"{name}: {value}" if name else str(value) for name, value in attributes)
        parts = [
            f"[{clock(start)}-{clock(round(end))}]",
            segment.get("text", ""),
            f"({facts})" if facts else "",
        ]
        lines.append(" ".join(part for part in parts if part))
    return "\n".join(lines)


def read_instructions(folder):
    """Folder of DOMAIN.txt, one instruction a line -> {domain: [instruction, ...]}

    An empty file is a pool of one empty instruction: the LLM answers the description alone.
    """
    pools = {}
    for file in sorted(Path(folder).glob("*.txt")):
        lines = [line.strip() for line in file.open(encoding="utf-8")]
        pools[file.stem] = [line for line in lines if line] or [""]
        if pools[file.stem] == [""]:
            run.warn(f"{file} is empty: the LLM answers the description without any instruction")
    if not pools:
        remedy = "give a folder with a text file per domain: speech.txt, …"
        raise FileNotFoundError(f"{folder} holds no instructions: {remedy}")
    return pools


# -- from a clip to training rows ------------------------------------------------------------------


@dataclass
class Job:
    """What a block needs besides its row numbers."""

    settings: Settings
    metadata: JsonLines
    pools: dict
    context: list
    tokenizer: Tokenizer
    llm: Llama | None  # None: with --export and --answers
    whisper: Whisper | None  # None: with --export
    warnings: run.Tally
    progress: bool
    answers: Answers | None = None
    seconds: Counter = field(default_factory=Counter)  # what the time went into
    n_blocks: int = 0  # answered by this rank

    @contextlib.contextmanager
    def timed(self, what):
        start = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - start

    def clip(self, i):
        """Metadata row i -> (clip, its description). ValueError if it cannot be used."""
        clip, name, s = self.metadata[i], self.metadata.name(i), self.settings
        if missing := [key for key in ("id", "domain", "segments") if key not in clip]:
            raise ValueError(f"{name} has no {', '.join(missing)}")
        if clip["domain"] not in self.pools:
            raise ValueError(
                f"{name}: no instructions for domain {clip['domain']!r} in {s.instructions}"
            )
        try:
            description = describe(clip["segments"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{name}: segments need start, end and attributes ({error!r})"
            ) from None
        if len(self.tokenizer.encode(description, special=False)) > s.max_description:
            raise ValueError(f"{name}: the description is longer than {s.max_description} tokens")
        return clip, description

    def windows(self, clip):
        """The waveforms of its file. ValueError or OSError if it cannot be used."""
        s = self.settings
        window = s.audio_root, s.audio_seconds, s.long_audio
        return audio_windows(clip["id"], *window, self.warnings.add)

    def each(self, indices, use):
        """-> {metadata row: use(clip, description)}, {metadata row: why it is skipped}"""
        good, skipped = {}, {}
        for i in indices:
            try:
                good[i] = use(*self.clip(i))
            except Exception as error:  # one bad clip among millions is counted, not fatal
                known = isinstance(error, (ValueError, OSError))
                reason = str(error) if known else f"{self.metadata.name(i)}: {error!r}"
                skipped[i] = [{"id": f"row {i + 1}", "skipped": " ".join(reason.split())}]
        return good, skipped

    def rows(self, clip, description, transcript):
        """Training rows of a clip, without their responses."""
        # it does not depend on its neighbours
        draw = random.Random(f"{self.settings.seed} {clip['id']}")
        pool = self.pools[clip["domain"]]
        for instruction in draw.sample(pool, min(self.settings.per_clip, len(pool))):
            audio = {"audio": clip["id"], "text": transcript}
            question = {
                "role": "user",
                "content": f"{START}{AUDIO}{END}" + f"\n\n{instruction}" * bool(instruction),
                "audios": [audio],
            }
            yield {
                "id": clip["id"],
                "dataset": clip.get("dataset", ""),
                "seed_description": description,
                "prompt": instruction,
                "response": None,
                "messages": [*self.context, question],
            }

    def prompt(self, row):
        """The prompt that training will use, its slot filled with words instead of sound. -> token
        ids
        """
        *context, question = row["messages"]
        described = [
            audio | {"description": row["seed_description"]} for audio in question["audios"]
        ]
        return build_prompt(
            self.tokenizer,
            [*context, question | {"audios": described}],
            description_slot(self.tokenizer),
        )

    def hear(self, indices):
        """Metadata rows -> training rows without responses; a clip that cannot be used gives {"id",
        "skipped": reason}.
        """
        with self.timed("reading"):
            heard = lambda clip, description: (clip, description, self.windows(clip))
            clips, rows = self.each(indices, heard)
        s, windows = self.settings, [windows for _, _, windows in clips.values()]
        device = self.whisper.encoder.conv1.weight.device
        with self.timed("transcripts"), run.beside_the_main_thread(device):
            transcripts = transcribe_windows(self.whisper, windows, s.audio_seconds)
        for (i, (clip, description, _)), transcript in zip(clips.items(), transcripts):
            rows[i] = list(self.rows(clip, description, transcript))
        return [row for i in indices for row in rows[i]]

    def answer(self, rows):
        """Give each row the LLM's own answer to its description: the target of training."""
        self.n_blocks += 1
        s, asked = self.settings, [row for row in rows if "skipped" not in row]
        prompts = [self.prompt(row) for row in asked]
        if self.answers:
            lines = self.answers.find([prompt_id(row["id"], p) for row, p in zip(asked, prompts)])
            for row, line in zip(asked, lines):
                row |= self.answers.read(line, s.max_new_tokens)
            return rows
        seeds = [f"{s.seed} {row['id']} {row['prompt']}" for row in asked]
        seeds = [random.Random(seed).getrandbits(62) for seed in seeds]
        sampling = s.max_new_tokens, s.temperature, s.top_p, self.tokenizer.stop_ids, seeds
        with self.timed("answers"):
            answers = generate(self.llm, prompts, *sampling, s.batch_size, self.progress)
        for row, ids in zip(asked, answers):
            row["response"] = self.tokenizer.decode(ids).strip()
            if ids[-1] not in self.tokenizer.stop_ids:
                row["truncated"] = True
        return rows

    def prompts(self, indices):
        """Metadata rows -> lines for another engine. Whether the audio can be read, only hearing
        tells.
        """
        clips, lines = self.each(indices, lambda *clip: clip)
        for i, clip in clips.items():
            rows = list(self.rows(*clip, transcript=""))
            lines[i] = [self.exported(row["id"], self.prompt(row)) for row in rows]
        return [line for i in indices for line in lines[i]]

    def exported(self, clip, prompt):
        text = self.tokenizer.decode(prompt, skip_special_tokens=False)
        id = prompt_id(clip, prompt)
        return {"id": id, "clip": clip, "prompt": text, "prompt_token_ids": prompt}


# -- all clips -------------------------------------------------------------------------------------


def merge(parts, out, keep_truncated, description):
    """Join the block files, in order, into the output; write counts and provenance beside it. ->
    counts, reasons
    """
    counts = {"rows": 0, "truncated": 0, "truncated_left_out": 0, "skipped": 0}
    skipped = []

    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            for line in (line for part in parts for line in part.open(encoding="utf-8")):
                row = json.loads(line)
                if "skipped" in row:
                    skipped.append({"id": row["id"], "skipped": row["skipped"]})
                elif row.get("truncated") and not keep_truncated:
                    counts["truncated_left_out"] += 1
                else:
                    counts["rows"] += 1
                    counts["truncated"] += bool(row.get("truncated"))
                    file.write(line)

    write_atomically(out, write)
    counts["skipped"] = len(skipped)
    write_json(f"{out}.info.json", description | {"counts": counts, "skipped": skipped[:1000]})
    return counts, [row["skipped"] for row in skipped]


def settings_of_rows(s):
    """Those that rows depend on; the others may change when a job goes on."""
    return {k: v for k, v in asdict(s).items() if k not in ("out", "batch_size", "ahead")}


def check_finished(s, out):
    """ValueError where a finished output was made with other settings."""
    info = Path(f"{out}.info.json")
    if not info.is_file():
        return
    before, free = read_json(info)["settings"], ("block", "answers")
    other = [k for k, v in settings_of_rows(s).items() if k not in free and before.get(k, v) != v]
    if other:
        remedy = "delete it, or give another --out"
        raise ValueError(f"{out} was made with another {', '.join(other)}: {remedy}")


def main():
    s = run.parse_settings(Settings, __doc__)
    start = time.time()
    rank, world, device = run.start_processes()
    if s.export and s.answers:
        raise ValueError("--export comes first, then the other engine, then --answers")
    out, folder = s.export or s.out, Path(f"{s.export or s.out}.parts")
    if Path(out).is_dir():
        raise ValueError(f"{out!r} is a folder: give a file name")
    context = read_context(s.system)
    if s.init_from:  # flag, then adapter, then recipe
        saved = DeSTAConfig.from_adapter(s.init_from)
        inherit(s, s.init_from, ("llm", "whisper", "audio_seconds", "long_audio"))
        if saved.max_answer_tokens > 0 and "max_new_tokens" not in s.given:
            s.max_new_tokens = saved.max_answer_tokens
        if saved.context is not None and "system" not in s.given:
            context = saved.context
    if Path(out).exists() and not folder.exists():
        check_finished(s, out)
        if rank == 0:
            print(f"{out} is there already: nothing to do (delete it to make it anew)")
        return
    metadata, pools = JsonLines(s.metadata), read_instructions(s.instructions)
    n_clips = len(metadata) if s.limit < 0 else min(s.limit, len(metadata))

    tokenizer, dtype = Tokenizer(s.llm), compute_dtype(device)
    answers = Answers(s.answers, tokenizer) if s.answers else None
    another_engine = s.export or s.answers
    llm = None if another_engine else Llama.from_pretrained(s.llm, dtype, device)
    whisper = None if s.export else Whisper.from_pretrained(s.whisper, dtype, device)
    warnings = run.Tally("warnings about audio files")
    job = Job(s, metadata, pools, context, tokenizer, llm, whisper, warnings, rank == 0, answers)
    hashes = {"weights_sha256": file_hash(s.llm)} if rank == 0 and not s.export else {}
    stamp = {
        "settings": settings_of_rows(s),
        "instructions": pools,
        "context": context,
        "metadata_bytes": metadata.bytes,
    }
    work = n_clips, s.block, folder, stamp | hashes, rank, world
    ahead = s.ahead == 1 or (s.ahead < 0 and device.type != "cpu")
    if s.export:
        parts = work_in_blocks(*work, job.prompts)
    elif ahead:
        parts = work_in_blocks(*work, job.answer, prepare=job.hear)
    else:
        parts = work_in_blocks(*work, lambda indices: job.answer(job.hear(indices)))
    warnings.close()
    if rank > 0:
        return
    told = run.description(s) | hashes
    if s.export:  # what the other engine must be told
        stop_ids = sorted(tokenizer.stop_ids)
        sampling = {"temperature": s.temperature, "top_p": s.top_p, "max_tokens": s.max_new_tokens}
        told["sampling"] = sampling | {"stop_token_ids": stop_ids}
    counts, reasons = merge(parts, out, s.keep_truncated, told)
    shutil.rmtree(folder)
    if counts["rows"] == 0:
        Path(out).unlink()  # else the next run would find its work done
        remedy = f"see {out}.info.json: is --audio_root right?"
        raise ValueError(f"no clip gave a row, {remedy} ({counts})")
    rows = f"{counts['rows']} rows ({counts['truncated']} truncated)"
    print(f"{out}: {rows}, {counts['skipped']} clips skipped, {time.time() - start:.0f} s")
    if job.seconds:
        n = max(1, job.n_blocks)
        spent = ", ".join(
            f"{what} {t:.1f} s ({t / n:.1f} a block)" for what, t in job.seconds.items()
        )
        print(f"rank 0: {spent}" + " (the first two while the LLM answered)" * bool(ahead and llm))
    if not s.export:  # a look at what the LLM made of the descriptions
        for row in map(json.loads, itertools.islice(open(out, encoding="utf-8"), 3)):
            print(f"  {row['seed_description']} -> {row['response']}")
    if left := counts["truncated_left_out"]:
        print(f"{left} answers were longer than --max_new_tokens {s.max_new_tokens} and left out")
    if reasons:
        more = f" (more in {out}.info.json)" if len(reasons) > 5 else ""
        print("skipped: " + "; ".join(reasons[:5]) + more)


if __name__ == "__main__":
    run.main(main)
