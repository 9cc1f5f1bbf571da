"""
generate_data.py: let the frozen LLM write its own training targets (paper section 3.1). The part the authors did not release.

metadata row -> description "[00:00-00:05] Hello world (Gender: female)" -> an instruction drawn from the pool of its domain
-> what the LLM answers to description + instruction (temperature 0.05, top-p 1.0) -> one training row.

    python generate_data.py                                     # the demo: data/demo/{train,test}.metadata.jsonl
    torchrun --nproc_per_node=8 generate_data.py --llm DIR --whisper DIR --metadata F.jsonl --audio_root DIR --out F.jsonl

Rows are made in blocks; a finished block is one file in OUT.parts/. A killed job therefore continues where it stopped, on
any number of processes, and ends with the same rows, for a block's result depends on its rows and the seed alone.
"""

import dataclasses
import json
import random
import shutil
import time
from pathlib import Path

import common
from common import setting
from llama import Llama, generate
from model import AUDIO, END, START, audio_windows, build_prompt, compute_dtype, description_slot, opening, transcribe_windows
from tokenizer import Tokenizer
from whisper import Whisper


@dataclasses.dataclass
class Settings:
    llm: str = setting("weights/smollm2-135m-instruct", "Hugging Face folder of the LLM that will later be trained against")
    whisper: str = setting("weights/whisper-tiny.en", "Hugging Face folder of the Whisper that writes the transcripts")
    metadata: str = setting("data/demo/train.metadata.jsonl", "clips with segments and attributes, one JSON object a line")
    audio_root: str = setting("data/demo", "folder that the ids (paths) in the metadata start from")
    out: str = setting("data/demo/train.jsonl", "training rows to write")
    instructions: str = setting("demo/instructions", "folder with speech.txt, sound.txt, music.txt: one instruction a line")
    system: str = setting("demo/context.json", "system prompt of every row, or a .json file of messages: system prompt and worked examples")
    per_clip: int = setting(1, "instructions drawn for each clip", low=1, high=1000)
    temperature: float = setting(0.05, "the paper's: nearly greedy", high=100)
    top_p: float = setting(1.0, "the paper's", low=1e-6, high=1)
    max_new_tokens: int = setting(36, "an answer cut here is marked \"truncated\": true; short ones suit the demo's small LLM", low=1, high=100_000)
    max_description: int = setting(1000, "tokens; clips with a longer description are left out: one would take all memory", low=1)
    keep_truncated: int = setting(0, "1 keeps cut answers in the file; by default they are counted and left out", high=1)
    batch_size: int = setting(64, "rows in flight while generating", low=1)
    block: int = setting(128, "rows saved together; at most this many are lost by a kill", low=1)
    audio_seconds: int = setting(6, "the transcript's window: clips are padded or cut to this; paper: 30", low=1, high=30)
    long_audio: str = setting("cut", "what becomes of longer clips: cut, or split into windows that are all transcribed")
    limit: int = setting(-1, "only the first so many clips; -1 means all", low=1)
    seed: int = setting(0, "of the drawn instructions and of sampling")


def clock(seconds):
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


def describe(segments):
    """A clip in words, one line per segment: "[00:00-00:05] Hello world (Gender: female, Pitch: high)"."""
    lines = []
    for segment in segments:
        if not 0 <= segment["start"] <= segment["end"]:
            raise ValueError(f"a segment from {segment['start']} to {segment['end']} s")
        facts = ", ".join(f"{name}: {value}" for name, value in segment.get("attributes", {}).items())
        time = f"[{clock(segment['start'])}-{clock(round(segment['end']))}]"
        parts = [time, segment.get("text", ""), f"({facts})" if facts else ""]
        lines.append(" ".join(part for part in parts if part))
    return "\n".join(lines)


def read_instructions(folder):
    """Folder of DOMAIN.txt, one instruction a line -> {domain: [instruction, ...]}"""
    files = sorted(Path(folder).glob("*.txt"))
    pools = {file.stem: [line.strip() for line in file.open(encoding="utf-8") if line.strip()] for file in files}
    if not any(pools.values()):
        raise FileNotFoundError(f"{folder} holds no instructions: put one text file per domain there (speech.txt, …)")
    return pools


def make_block(indices, metadata, pools, context, settings, llm, tokenizer, whisper, progress=False):
    """The training rows of metadata[indices]; a clip that cannot be used gives {"id", "skipped": reason} instead."""
    rows, clips = [], []
    for i in indices:
        try:
            clip = metadata[i]
            missing = [key for key in ("id", "domain", "segments") if key not in clip]
            if missing:
                raise ValueError(f"{metadata.name(i)} has no {', '.join(missing)}")
            if clip["domain"] not in pools:
                raise ValueError(f"{metadata.name(i)}: no instructions for domain {clip['domain']!r} in {settings.instructions}")
            row = {"index": i, "clip": clip, "description": describe(clip["segments"])}
            if len(tokenizer.encode(row["description"], special=False)) > settings.max_description:
                raise ValueError(f"{metadata.name(i)}: the description is longer than {settings.max_description} tokens")
            clips.append(audio_windows(clip["id"], settings.audio_root, settings.audio_seconds, settings.long_audio))
            rows.append(row)
        except (ValueError, OSError) as error:  # one bad clip among millions is counted, not fatal
            rows.append({"index": i, "skipped": " ".join(str(error).split())})
        except Exception as error:  # a row can be wrong in more ways than can be listed
            rows.append({"index": i, "skipped": f"{metadata.name(i)}: segments need start, end and attributes ({error!r})"})
    transcripts = iter(transcribe_windows(whisper, clips, settings.audio_seconds, min(128, 8 * settings.audio_seconds)))
    finished, prompts, seeds = [], [], []
    for row in rows:
        if "skipped" in row:
            finished.append({"id": f"row {row['index'] + 1}", "skipped": row["skipped"]})
            continue
        clip, transcript = row["clip"], next(transcripts)
        draw = random.Random(f"{settings.seed} {clip['id']}")  # a row's instructions do not depend on its neighbours
        pool = pools[clip["domain"]]
        for k, instruction in enumerate(draw.sample(pool, min(settings.per_clip, len(pool)))):
            audio = {"audio": clip["id"], "text": transcript}
            content = f"{START}{AUDIO}{END}\n\n{instruction}"
            messages = [*context, {"role": "user", "content": content, "audios": [audio]}]
            finished.append({
                "id": clip["id"],
                "dataset": clip.get("dataset", ""),
                "seed_description": row["description"],
                "prompt": instruction,
                "response": None,
                "messages": messages,
            })  # fmt: skip
            # The same prompt that training will use, its slot filled with words instead of sound.
            described = [m | {"audios": [audio | {"description": row["description"]}]} if "audios" in m else m for m in messages]
            prompts.append(build_prompt(tokenizer, described, description_slot(tokenizer)))
            seeds.append(random.Random(f"{settings.seed} {clip['id']} {k}").getrandbits(62))
    s = settings
    answers = iter(generate(llm, prompts, s.max_new_tokens, s.temperature, s.top_p, tokenizer.stop_ids, seeds, s.batch_size, progress))
    for row in finished:
        if "skipped" not in row:
            answer = next(answers)
            row["response"] = tokenizer.decode(answer).strip()
            if answer[-1] not in tokenizer.stop_ids:
                row["truncated"] = True
    return finished


def merge(parts, settings, description):
    """Join the block files, in order, into the output; write counts and provenance beside it."""
    counts = {"rows": 0, "truncated": 0, "truncated_left_out": 0, "skipped": 0}
    skipped = []

    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as out:
            for part in parts:
                for line in part.open(encoding="utf-8"):
                    row = json.loads(line)
                    if "skipped" in row:
                        skipped.append(row)
                    elif row.get("truncated") and not settings.keep_truncated:
                        counts["truncated_left_out"] += 1
                    else:
                        counts["rows"] += 1
                        counts["truncated"] += bool(row.get("truncated"))
                        out.write(line)

    common.write_atomically(settings.out, write)
    counts["skipped"] = len(skipped)
    common.write_text(f"{settings.out}.info.json", json.dumps(description | {"counts": counts, "skipped": skipped[:1000]}, indent=2))
    return counts


def main():
    settings = common.parse_settings(Settings, __doc__)
    if settings.long_audio not in ("cut", "split"):
        raise ValueError(f"--long_audio {settings.long_audio!r} is neither cut nor split")
    start = time.time()
    rank, world, device = common.start_processes()
    if Path(settings.out).is_dir():
        raise ValueError(f"--out {settings.out!r} is a folder: give a file name")
    metadata = common.JsonLines(settings.metadata)
    pools, context = read_instructions(settings.instructions), opening(settings.system)
    n_clips = len(metadata) if settings.limit < 0 else min(settings.limit, len(metadata))
    folder = Path(f"{settings.out}.parts")
    if Path(settings.out).exists() and not folder.exists():
        print(f"{settings.out} is there already: nothing to do (delete it to make it anew)")
        return

    dtype = compute_dtype(device)
    tokenizer = Tokenizer(settings.llm)
    llm = Llama.from_pretrained(settings.llm, dtype, device)
    whisper = Whisper.from_pretrained(settings.whisper, dtype, device)
    make = lambda indices: make_block(indices, metadata, pools, context, settings, llm, tokenizer, whisper, progress=rank == 0)
    hashes = {"weights_sha256": common.file_hash(settings.llm)} if rank == 0 else {}
    stamp = {"settings": dataclasses.asdict(settings), "instructions": pools, "context": context, "metadata_bytes": metadata.bytes} | hashes
    parts = common.work_in_blocks(n_clips, settings.block, folder, stamp, rank, world, make)
    if rank == 0:
        counts = merge(parts, settings, common.run_description(settings) | hashes)
        shutil.rmtree(folder)
        if counts["rows"] == 0:
            Path(settings.out).unlink()  # else the next run would find its work done
            raise ValueError(f"no clip gave a row, see {settings.out}.info.json: is --audio_root right? ({counts})")
        seconds = time.time() - start
        print(f"{settings.out}: {counts['rows']} rows ({counts['truncated']} truncated), {counts['skipped']} clips skipped, {seconds:.0f} s")
        if counts["skipped"]:
            reasons = [row["skipped"] for row in json.loads(Path(f"{settings.out}.info.json").read_text(encoding="utf-8"))["skipped"]]
            print("skipped: " + "; ".join(reasons[:5]) + f" (more in {settings.out}.info.json)" * (len(reasons) > 5))


if __name__ == "__main__":
    common.run(main)
