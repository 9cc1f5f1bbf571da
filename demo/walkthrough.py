"""
walkthrough.py: one held-out clip through the whole method, every stage printed. Read it beside
model.py.

    python demo/walkthrough.py                                  # after demo/prepare.py
    python demo/walkthrough.py --row 7 --adapter out/demo/adapter

Before training the adapter is a random one, which hears nothing.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
from engine import run
from engine.rows import JsonLines
from engine.run import setting
from generate_data import describe, read_instructions
from model import AUDIO, AUDIO_ID, DeSTA, audio_slot, build_prompt, description_slot, read_context
from recipes import GENERATE_DATA, TRAIN
from whisper import load_audio


@dataclass
class Settings:
    metadata: str = setting("data/demo/test.metadata.jsonl", "clips with segments and attributes")
    audio_root: str = setting("data/demo", "folder that the clips' ids start from")
    row: int = setting(1, "which clip, from 0; the next one is the wrong clip")
    adapter: str = setting("out/demo/adapter", "folder written by train.py")
    llm: str = setting("weights/smollm2-135m-instruct", "Hugging Face folder")
    whisper: str = setting("weights/whisper-tiny.en", "Hugging Face folder")


def title(text):
    print(f"\n== {text}")


@torch.inference_mode()
def main():
    s = run.parse_settings(Settings, __doc__)
    clips, root = JsonLines(s.metadata), Path(s.audio_root)
    clip, other = (clips[(s.row + k) % len(clips)] for k in (0, 1))
    trained = (Path(s.adapter) / "config.json").is_file()
    demo = {name: TRAIN[name]["demo"] for name in ("n_layers", "n_queries", "audio_seconds")}
    torch.manual_seed(0)
    options = dict(adapter=s.adapter) if trained else demo
    model = DeSTA.from_pretrained(s.llm, s.whisper, **options)
    tokenizer, n_vectors = model.tokenizer, model.adapter.n_vectors
    print(f"clip {clip['id']}, a wrong clip {other['id']}")
    if not trained:
        print(f"{s.adapter} is not there yet: this adapter is random, and hears nothing.")

    title("1. The clip in words (generate_data.describe)")
    description = describe(clip["segments"])
    print(description)

    title("2. One prompt with a slot for the clip (model.build_prompt)")
    instruction = read_instructions(GENERATE_DATA["instructions"]["demo"])[clip["domain"]][0]
    context = model.config.context or read_context(GENERATE_DATA["system"]["demo"])
    audio = {"audio": clip["id"], "text": None, "description": description}
    question = {"role": "user", "content": f"{AUDIO}\n\n{instruction}", "audios": [audio]}
    messages = model.with_transcripts([[*context, question]], root)[0]
    print(f"{len(context)} messages (system prompt, examples), then {question['content']!r}")

    title("3. The slot filled with words: the LLM's own answer is the training target")
    in_words = description_slot(tokenizer)
    ids = build_prompt(tokenizer, messages, in_words)
    print(f"{len(ids)} tokens, ending {tokenizer.decode(ids[-60:], skip_special_tokens=False)!r}")
    target = model.generate(messages, 36, root=root, fill=in_words)[0]
    print(f"target: {target}")

    title("4. The slot filled with sound")
    waveform = load_audio(root / clip["id"])
    mel = model.reader.mels(clip["id"], root)
    taps = model.whisper.encode(mel.to(model.device), model.taps)
    print(f"waveform       {tuple(waveform.shape)}")
    print(f"log-mel        {tuple(mel.shape)}")
    print(f"encoder taps   {tuple(taps.shape)}")
    print(f"audio vectors  {tuple(model.adapter(taps).shape)}")
    print(f"transcript     {messages[-1]['audios'][0]['text']!r}")
    ids = build_prompt(tokenizer, messages, audio_slot(tokenizer, n_vectors))
    print(f"{len(ids)} places, {ids.count(AUDIO_ID)} of them vectors; the rest is as above")

    title("5. Loss of the target, per token, by what the slot holds (model.DeSTA.losses)")
    fills = {"right clip": None, "wrong clip": None, "nothing": lambda _: [], "words": in_words}
    for name, fill in fills.items():
        row = model.reader.prepare({"messages": messages, "response": target}, root, fill)
        if name == "wrong clip":
            row["mels"] = list(model.reader.mels(other["id"], root))
        print(f"{name:12} {model.losses([row]).mean():.3f}")

    title("6. Asked with sound, the LLM says")
    print(model.generate(messages, 36, root=root)[0])


if __name__ == "__main__":
    run.main(main)
