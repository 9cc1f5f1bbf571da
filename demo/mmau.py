"""
mmau.py: questions in MMAU's form about the demo's held-out clips, with choices made from their
labels.

    python demo/mmau.py                                        # writes data/demo/mmau.json
    python eval.py --task mmau --data data/demo/mmau.json --out out/demo/mmau.jsonl
    python eval.py --task mmau --data data/demo/mmau.json --out out/demo/mmau.text.jsonl --text_only 1
    python eval.py --task mmau --score out/demo/mmau.jsonl,out/demo/mmau.text.jsonl

The second command answers from the audio, the third from the description, the last prints both
side by side, with chance.

One question per clip, about an attribute drawn for it; the wrong choices are up to three other
values that this attribute takes in the same domain. `description`, what the LLM reads in place of
the audio, is not part of MMAU.
"""

import dataclasses
import json
import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
from engine.checkpoint import write_text
from engine.rows import JsonLines
from engine.run import main, parse_settings, setting
from generate_data import describe

DIFFICULTY = {2: "easy", 3: "medium", 4: "hard"}  # by the number of choices


@dataclasses.dataclass
class Settings:
    metadata: str = setting("data/demo/test.metadata.jsonl", "labelled clips")
    out: str = setting("data/demo/mmau.json", "the questions")


def questions(clips):
    """Metadata rows -> MMAU rows. A clip's draw depends on its id alone."""
    values = {}  # each in one spelling: "Male" is no choice beside another corpus's "male"
    for clip in clips:
        for name, value in clip["segments"][0]["attributes"].items():
            values.setdefault((clip["domain"], name), {}).setdefault(value.lower(), value)
    for clip in clips:
        draw, attributes = random.Random(clip["id"]), clip["segments"][0]["attributes"]
        names = [name for name in attributes if len(values[clip["domain"], name]) > 1]
        if not names:
            continue
        name = draw.choice(names)
        spelled = values[clip["domain"], name]
        others = sorted(spelled[key] for key in spelled if key != attributes[name].lower())
        choices = [attributes[name], *draw.sample(others, min(3, len(others)))]
        draw.shuffle(choices)
        yield {
            "id": clip["id"],
            "audio_id": clip["id"],
            "question": f"What is the {name.lower()}?",
            "choices": choices,
            "answer": attributes[name],
            "dataset": clip["dataset"],
            "task": clip["domain"],
            "split": "demo",
            "category": "Perception",
            "sub-category": name,
            "difficulty": DIFFICULTY[len(choices)],
            "description": describe(clip["segments"]),
        }


def mmau():
    settings = parse_settings(Settings, __doc__)
    rows = list(questions(list(JsonLines(settings.metadata))))
    write_text(settings.out, json.dumps(rows, ensure_ascii=False, indent=1))
    print(f"{settings.out}: {len(rows)} questions, one per clip")


if __name__ == "__main__":
    main(mmau)
