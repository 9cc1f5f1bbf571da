"""
corpora.py: from a corpus as its authors publish it to metadata, the input of generate_data.py.

    python corpora.py                 # what is known, where to get it, its licence
    python corpora.py esc50           # how ESC-50's folder is laid out
    python corpora.py esc50 /data/ESC-50 --out esc50.metadata.jsonl
    python corpora.py folder my_sounds --attribute Animal --out mine.metadata.jsonl
    python corpora.py instructions /data/DeSTA-AQA5M --out instructions

Writes esc50.train.metadata.jsonl, esc50.test.metadata.jsonl (and esc50.validation.metadata.jsonl,
where the release has such a part) and esc50.report.json: counts, labels, and every clip that was
left out, by reason. A line of metadata, made of one audio file:

    {"id": "audio/1-100032-A-0.wav", "dataset": "esc50", "domain": "sound", "group": "100032",
     "segments": [{"start": 0.0, "end": 5.0,
                   "attributes": {"Audio category": "dog", "Duration": "5s"}}]}

The DeSTA2.5-Audio paper (section 3.1, appendix) describes 50 corpora this way. Names and spelling
of the attributes are those of the published descriptions, DeSTA-AQA5M's field `seed_description`.

To add a corpus, write one function below: it takes the folder, looks at names and tables, and
yields a Clip for each audio file. Everything else is done for it: reading, checks, split, report.
"""

import ast
import collections
import csv
import dataclasses
import gzip
import hashlib
import inspect
import json
import math
import re
import sys
import time
import zlib
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
from tqdm import tqdm

from engine import checkpoint, run
from engine.run import argument, setting
from engine.sound import read_sound
from whisper import log_mel, resample


@dataclasses.dataclass
class Settings:
    corpus: str = argument("one of those that `python corpora.py` lists, or instructions")
    folder: str = argument("the corpus, unpacked; for instructions: the folder of DeSTA-AQA5M")
    out: str = setting("", "metadata to write, NAME.metadata.jsonl; for instructions: a folder")
    audio_root: str = setting("", "the ids are paths from here; by default the corpus's own folder")
    test: str = setting("", "hold out these groups (speakers, …) instead: names, with commas")
    attribute: str = setting("Sound", "folder: what its labels are called")
    domain: str = setting("sound", "folder: speech, sound or music, the pool of instructions")


@dataclasses.dataclass(slots=True)
class Clip:
    path: Path
    domain: str  # speech, sound or music: which pool of instructions suits it
    attributes: dict  # as in the description: {"Gender": "Female"}; the name "" for a bare caption
    text: str = ""  # what is said
    group: str = ""  # who or what it comes from: on one side only, but for what the release says
    split: str = ""  # train, validation or test where the release says so; else the frame decides
    problem: str = ""  # why it cannot be used, where the tables tell already


MEASURED = "measured"  # the value of a Duration that is filled in when the clip has been read
KNOWN = {}  # name -> the function that reads the corpus; .url .licence .by .test


def corpus(name, url, licence, *, by, test=()):
    """Make a function known as the reader of a corpus.

    by: what a group is, "speaker" for instance. "recording" is found by listening: clips of one
    label that share sound. test: the groups to hold out; without them 15 % of the clips are.
    """

    def register(read):
        read.url, read.licence, read.by, read.test = url, licence, by, test
        KNOWN[name] = read
        return read

    return register


# -- real recordings that any machine can fetch ----------------------------------------------------


@corpus(
    "animals", "https://github.com/YashNita/Animal-Sound-Dataset", "CC BY-SA 4.0", by="recording"
)
def animals(root):
    """Animal sounds: 875 clips of ten animals, in folders that are named in Turkish.

    Aslan/aslan_1.wav, Kedi-Part1/cat_2.wav; classes of 200 lie in two parts. The numbers tell
    nothing of where a clip comes from, and many are copies or cuts of the same recording.
    """
    english = {
        "Aslan": "lion", "Esek": "donkey", "Inek": "cow", "Kedi": "cat", "Kopek": "dog",
        "Koyun": "sheep", "Kurbaga": "frog", "Kus": "bird", "Maymun": "monkey", "Tavuk": "chicken",
    }  # fmt: skip
    for path in find(root, "*/*.wav"):
        animal = english.get(path.parent.name.split("-Part")[0])
        yield Clip(path, "sound", {"Animal": animal})


@corpus(
    "emodb", "http://emodb.bilderbar.info", "free for research", by="speaker", test=("15", "16")
)
def emodb(root):
    """Berlin Database of Emotional Speech: 535 clips, ten actors, ten German sentences.

    wav/03a01Fa.wav is speaker 03, sentence a01, emotion F (German initials), version a: as the site
    tells under "Code of utterances" (Burkhardt et al. 2005, A database of German emotional speech).
    github.com/sylaschacko/voice-emotion-analysis has a copy, in which clips are cut or padded to
    2 s: long sentences end early there.
    """
    # As adjectives: an LLM that answers in its own words says "angry" where it reads "Anger" (LOG.md).
    emotions = {
        "W": "Angry", "L": "Bored", "E": "Disgusted", "A": "Fearful",
        "F": "Happy", "T": "Sad", "N": "Neutral",
    }  # fmt: skip
    male = {"03", "10", "11", "12", "15"}
    sentences = {
        "a01": "Der Lappen liegt auf dem Eisschrank.",
        "a02": "Das will sie am Mittwoch abgeben.",
        "a04": "Heute abend könnte ich es ihm sagen.",
        "a05": "Das schwarze Stück Papier befindet sich da oben neben dem Holzstück.",
        "a07": "In sieben Stunden wird es soweit sein.",
        "b01": "Was sind denn das für Tüten, die da unter dem Tisch stehen?",
        "b02": "Sie haben es gerade hochgetragen und jetzt gehen sie wieder runter.",
        "b03": "An den Wochenenden bin ich jetzt immer nach Hause gefahren und habe Agnes besucht.",
        "b09": "Ich will das eben wegbringen und dann mit Karl was trinken gehen.",
        "b10": "Die wird auf dem Platz sein, wo wir sie immer hinlegen.",
    }
    for path in find(root, "wav/*.wav"):
        name = re.fullmatch(r"(\d\d)([ab]\d\d)([WLEAFTN])[a-z]", path.stem)
        speaker, sentence, emotion = name.groups() if name else ("", "", "")
        gender = ("Male" if speaker in male else "Female") if name else None
        attributes = {"Emotion": emotions.get(emotion), "Gender": gender}
        yield Clip(path, "speech", attributes, sentences.get(sentence, ""), group=speaker)


@corpus(
    "digits",
    "https://github.com/Jakobovski/free-spoken-digit-dataset",
    "CC BY-SA 4.0",
    by="speaker",
    test=("theo",),
)
def digits(root):
    """Free Spoken Digit Dataset: 3,000 English digits of six speakers, 8 kHz.

    recordings/7_theo_3.wav is digit 7, speaker theo, version 3; metadata.py holds a dict of gender
    and accent ("DEU/German") by speaker. As in the repository's README.
    """
    (facts,) = find(root, "metadata.py")
    # The file is Python. Its dict is read, and nothing in it is run.
    tree = ast.parse(facts.read_text(encoding="utf-8"))
    (speakers,) = (ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign))
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    for path in find(root, "recordings/*.wav"):
        digit, _, rest = path.stem.partition("_")
        speaker = rest.rpartition("_")[0]
        fact = speakers.get(speaker, {})
        accent = fact.get("accent", "").rpartition("/")[2]
        attributes = {
            "Gender": fact.get("gender", "").capitalize(),
            "Accent": "American" if accent == "neutral" else accent,
        }
        text = words[int(digit)] if digit in set("0123456789") else ""
        yield Clip(path, "speech", attributes, text, group=speaker)


@corpus(
    "philharmonia",
    "https://github.com/skratchdot/philharmonia-samples",
    "free for any use but resale as samples",
    by="note",
)
def philharmonia(root):
    """Notes of the Philharmonia Orchestra's players: 9,750 mp3 of 16 folders of instruments.

    audio/cello/cello_A3_1_forte_arco-normal.mp3: instrument, note (As3 is A sharp 3), length,
    dynamics, articulation. Percussion has a folder for each instrument and no note.
    Dynamics are put in words: a language model takes "Dynamics: piano" for a piano that plays.
    """
    dynamics = {
        "molto-pianissimo": "extremely soft", "pianissimo": "very soft", "piano": "soft",
        "mezzo-piano": "moderately soft", "mezzo-forte": "moderately loud", "forte": "loud",
        "fortissimo": "very loud", "crescendo": "getting louder", "decrescendo": "getting softer",
        "cresc-decresc": "getting louder, then softer",
    }  # fmt: skip
    strings = {"arco": "bowed", "pizz": "plucked", "normal": ""}
    for path in find(root, "audio/**/*.mp3"):
        parts = path.stem.split("_")
        if len(parts) != 5:
            yield Clip(path, "music", {})
            continue
        instrument, note, _, loudness, articulation = parts
        articulation = [strings.get(word, word) for word in articulation.split("-")]
        attributes = {
            "Instrument": instrument.replace("-", " ") if note else path.parent.name,
            "Note": re.sub(r"^([A-G])s(\d)$", r"\1#\2", note),
            "Dynamics": dynamics.get(loudness, loudness.replace("-", " ")),
            "Articulation": " ".join(word for word in articulation if word),
        }
        yield Clip(path, "music", attributes, group=attributes["Note"] or path.stem)


@corpus(
    "asterisk",
    "Debian's packages asterisk-core-sounds-{en,es,fr,it,ru} and the same with -wav",
    "CC BY-SA 3.0 (Russian: CC BY 3.0)",
    by="prompt",
)
def asterisk(root):
    """A telephone exchange's prompts in five languages, some 550 each.

    One voice for each language; English and Spanish share one, and only the Italian is a man's.
    Unpack both packages of a language with `dpkg -x PACKAGE.deb FOLDER`. The texts are lines
    `name: text` of usr/share/doc/asterisk-core-sounds-fr/core-sounds-fr.txt.gz, the audio is
    usr/share/asterisk/sounds/fr_CA_f_June/name.wav. What stands in brackets is not spoken.
    A prompt is held out in all languages, so that its text is new too.
    """
    languages = {"en": "English", "es": "Spanish", "fr": "French", "it": "Italian", "ru": "Russian"}
    sounds = root / "usr/share/asterisk/sounds"
    for book in find(root, "usr/share/doc/asterisk-core-sounds-*/core-sounds-??.txt.gz"):
        code = book.name[len("core-sounds-") :][:2]
        (voice,) = find(sounds, f"{code}_*")
        texts = {}
        for line in gzip.open(book, "rt", encoding="utf-8-sig"):
            name, colon, text = line.partition(":")
            if colon and not line.startswith(";"):
                spoken = re.sub(r"\[.*?\]|<.*?>|\(.*?\)", " ", text)
                texts[name.strip()] = " ".join(spoken.lstrip(" .…").split())
        names = {
            path.relative_to(voice).with_suffix("").as_posix() for path in voice.rglob("*.wav")
        }
        for name in sorted(names | set(texts)):
            attributes = {"Language": languages.get(code, code)}
            attributes["Gender"] = {"f": "Female", "m": "Male"}.get(voice.name.split("_")[2])
            problem = "" if texts.get(name) else "unlabelled"  # a tone, silence, or no line at all
            path = voice / f"{name}.wav"
            yield Clip(path, "speech", attributes, texts.get(name, ""), name, problem=problem)


# -- a user's own sounds ---------------------------------------------------------------------------


@corpus("folder", "your own", "yours", by="recording")
def folder(root, attribute="Sound", domain="sound"):
    """One folder per label, what most people have: my_sounds/door knock/any/depth/1.wav.

    A first level of train, validation and test is taken as the split. --attribute says what the
    labels are (Emotion, Instrument, …), --domain whether the clips are speech, sound or music.
    """
    splits = {"train", "validation", "test"}
    formats = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au"}
    for path in find(root, "**/*"):
        if path.suffix.lower() not in formats:
            continue
        *place, _ = path.relative_to(root).parts
        split = place.pop(0) if place and place[0] in splits else ""
        label = place[0].replace("_", " ") if place else None
        yield Clip(path, domain, {attribute: label}, split=split)


# -- corpora of the field: sounds and music --------------------------------------------------------


@corpus("esc50", "https://github.com/karolpiczak/ESC-50", "CC BY-NC 3.0", by="source")
def esc50(root):
    """ESC-50: 2,000 environmental sounds of 5 s, 50 classes (Piczak 2015; the repository's README).

    meta/esc50.csv names file, category, fold and the Freesound recording (src_file); audio/*.wav.
    The folds keep a recording's clips together: fold 5 is the test.
    """
    for row in table(root, "meta/esc50.csv"):
        attributes = {"Audio category": row["category"], "Duration": MEASURED}
        split = "test" if row["fold"] == "5" else "train"
        yield Clip(
            root / "audio" / row["filename"], "sound", attributes, "", row["src_file"], split
        )


@corpus(
    "fsd50k",
    "https://zenodo.org/records/4060432",
    "CC BY 4.0; each clip has its own: CC0, CC BY, CC BY-NC or CC Sampling+",
    by="uploader",
)
def fsd50k(root):
    """FSD50K: 51,197 Freesound clips, 200 classes of AudioSet (Fonseca et al. 2020, FSD50K.doc).

    FSD50K.ground_truth/dev.csv (fname, labels, mids, split: train or val) and eval.csv; audio in
    FSD50K.dev_audio/ and FSD50K.eval_audio/. Labels include all their parents in the ontology.
    No uploader is in both dev and eval.
    """
    names = {"train": "train", "val": "validation", "eval": "test"}
    for part in ("dev", "eval"):
        for row in table(root, f"FSD50K.ground_truth/{part}.csv"):
            labels = row["labels"].replace("_", " ").replace(",", ", ")
            path = root / f"FSD50K.{part}_audio/{row['fname']}.wav"
            split = names[row.get("split", "eval")]
            yield Clip(path, "sound", {"Type": labels}, split=split)


@corpus(
    "clotho",
    "https://zenodo.org/records/4783391",
    "captions: Tampere University's, non-commercial; audio: Creative Commons, clip by clip",
    by="recording",
)
def clotho(root):
    """Clotho 2.1: 5,929 Freesound clips of 15 to 30 s, five captions each (Drossos et al. 2020).

    development/, validation/ and evaluation/ with the wav files, and a clotho_captions_*.csv of
    each: file_name, caption_1 to caption_5. The first is taken: a description holds one.
    """
    names = {"development": "train", "validation": "validation", "evaluation": "test"}
    for part, split in names.items():
        for row in table(root, f"clotho_captions_{part}.csv"):
            path = root / part / row["file_name"]
            yield Clip(path, "sound", {"": row["caption_1"].strip()}, split=split)


@corpus("nsynth", "https://magenta.tensorflow.org/datasets/nsynth", "CC BY 4.0", by="instrument")
def nsynth(root):
    """NSynth: 305,979 notes of 4 s from 1,006 instruments (Engel et al. 2017; the site, "Format").

    nsynth-train/, nsynth-valid/ and nsynth-test/, each with examples.json (note -> features) and
    audio/*.wav. No instrument of train is in the other two.
    """
    names = {"train": "train", "valid": "validation", "test": "test"}
    for examples in find(root, "nsynth-*/examples.json"):
        part = examples.parent
        for note, facts in json.loads(examples.read_text(encoding="utf-8")).items():
            attributes = {
                "Family": facts["instrument_family_str"],
                "Source": facts["instrument_source_str"],
                "MIDI Note": f"{facts['pitch']:03d}",
                "MIDI Velocity": f"{facts['velocity']:03d}",
                "Qualities": ", ".join(facts["qualities_str"]),
            }
            split = names[part.name.removeprefix("nsynth-")]
            path = part / f"audio/{note}.wav"
            yield Clip(path, "music", attributes, "", facts["instrument_str"], split)


@corpus("gtzan", "http://marsyas.info/downloads/datasets.html", "none stated", by="recording")
def gtzan(root):
    """GTZAN: 1,000 excerpts of 30 s of music, ten genres (Tzanetakis & Cook 2002).

    genres/blues/blues.00000.au; some copies hold wav instead. The release has no split, and it has
    several excerpts of an artist, copies and wrong labels (Sturm 2013). Where the fault-filtered
    lists of Kereliuk et al. 2015 (train_filtered.txt, valid_filtered.txt, test_filtered.txt: no
    artist in two of them) lie in the folder too, they are used.
    """
    names = {"train": "train", "valid": "validation", "test": "test"}
    lists = {part: root / f"{part}_filtered.txt" for part in names}
    listed = {
        Path(line.strip()).stem: names[part]
        for part, path in lists.items()
        if path.is_file()
        for line in path.open(encoding="utf-8")
    }
    for path in find(root, "**/*.[0-9][0-9][0-9][0-9][0-9].*"):
        split = listed.get(path.stem, "")
        problem = "faulty or an artist's surplus" if listed and not split else ""
        attributes = {"Genre": path.stem.split(".")[0], "Duration": MEASURED}
        yield Clip(path, "music", attributes, split=split, problem=problem)


# -- corpora of the field: speech ------------------------------------------------------------------


@corpus("common_voice", "https://commonvoice.mozilla.org/datasets", "CC0 1.0", by="speaker")
def common_voice(root):
    """Common Voice, one language: the folder cv-corpus-VERSION/LANGUAGE (Ardila et al. 2020).

    train.tsv, dev.tsv and test.tsv (no speaker in two of them): client_id, path, sentence, age,
    gender, accents, …; clips/*.mp3. Most speakers tell neither age nor gender nor accent.
    """
    for part, split in {"train": "train", "dev": "validation", "test": "test"}.items():
        for row in table(root, f"{part}.tsv"):
            attributes = {
                "Gender": row["gender"],
                "Age": row["age"],
                "Accent": row.get("accents") or row.get("accent"),  # the name until version 7
                "Duration": MEASURED,
            }
            path = root / "clips" / row["path"]
            yield Clip(path, "speech", attributes, row["sentence"], row["client_id"], split)


@corpus("vctk", "https://datashare.ed.ac.uk/handle/10283/3443", "CC BY 4.0", by="speaker")
def vctk(root):
    """VCTK 0.92: 110 English speakers, some 400 sentences each (README of the release).

    wav48_silence_trimmed/p225/p225_001_mic1.flac, txt/p225/p225_001.txt, and speaker-info.txt: id,
    age, gender, accent, region, in columns of spaces. Of the two microphones the first is taken.
    """
    (info,) = find(root, "speaker-info.txt")
    lines = re.findall(r"^(\w+) +(\d+) +([FM]) +(\w+)", info.read_text(encoding="utf-8"), re.M)
    speakers = {speaker: facts for speaker, *facts in lines}
    for path in find(root, "wav48_silence_trimmed/*/*_mic1.flac"):
        speaker, name = path.parent.name, path.stem.removesuffix("_mic1")
        age, gender, accent = speakers.get(speaker, ("", "", ""))
        attributes = {"Gender": GENDERS.get(gender), "Accent": accent.lower(), "Age": age}
        text = beside(root / f"txt/{speaker}/{name}.txt")
        yield Clip(path, "speech", attributes, text, group=speaker)


@corpus(
    "crema_d",
    "https://github.com/CheyneyComputerScience/CREMA-D",
    "ODbL 1.0, DbCL 1.0",
    by="speaker",
)
def crema_d(root):
    """CREMA-D: 7,442 clips, 91 actors, 12 sentences, 6 emotions (Cao et al. 2014; README).

    AudioWAV/1001_DFA_ANG_XX.wav is actor, sentence, emotion, level; VideoDemographics.csv tells
    ActorID, Age, Sex, Race, Ethnicity. The audio needs `git lfs pull`.
    """
    emotions = {
        "ANG": "Anger", "DIS": "Disgust", "FEA": "Fear",
        "HAP": "Happy", "NEU": "Neutral", "SAD": "Sad",
    }  # fmt: skip
    sentences = {
        "IEO": "It's eleven o'clock.",
        "TIE": "That is exactly what happened.",
        "IOM": "I'm on my way to the meeting.",
        "IWW": "I wonder what this is about.",
        "TAI": "The airplane is almost full.",
        "MTI": "Maybe tomorrow it will be cold.",
        "IWL": "I would like a new alarm clock.",
        "ITH": "I think I have a doctor's appointment.",
        "DFA": "Don't forget a jacket.",
        "ITS": "I think I've seen this before.",
        "TSI": "The surface is slick.",
        "WSI": "We'll stop in a couple of minutes.",
    }
    actors = {row["ActorID"]: row for row in table(root, "VideoDemographics.csv")}
    for path in find(root, "AudioWAV/*.wav"):
        actor, sentence, emotion, _ = (path.stem.split("_") + [""] * 4)[:4]
        facts = actors.get(actor, {})
        attributes = {
            "Emotion": emotions.get(emotion),
            "Gender": facts.get("Sex"),
            "Age": facts.get("Age"),
            "Race": facts.get("Race"),
            "Ethnicity": facts.get("Ethnicity"),
        }
        yield Clip(path, "speech", attributes, sentences.get(sentence, ""), group=actor)


@corpus(
    "speech_commands",
    "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
    "CC BY 4.0",
    by="speaker",
)
def speech_commands(root):
    """Speech Commands 0.02: 105,829 words of 1 s, 35 of them (Warden 2018; README of the archive).

    yes/0a7c2a8d_nohash_0.wav: word, speaker, repetition. testing_list.txt and validation_list.txt
    name files by path, all of a speaker's on one side. _background_noise_ is left aside.
    """
    splits = {}
    for name, split in {"validation_list": "validation", "testing_list": "test"}.items():
        (path,) = find(root, f"{name}.txt")
        splits |= dict.fromkeys(path.read_text(encoding="utf-8").split(), split)
    for path in find(root, "[a-z]*/*_nohash_*.wav"):
        word, speaker = path.parent.name, path.name.split("_")[0]
        split = splits.get(f"{word}/{path.name}", "train")
        attributes = {"Command": word, "Duration": MEASURED}
        yield Clip(path, "speech", attributes, word, speaker, split)


@corpus("libritts_r", "https://www.openslr.org/141", "CC BY 4.0", by="speaker")
def libritts_r(root):
    """LibriTTS-R: 585 hours of read books, 2,456 speakers (Koizumi et al. 2023).

    The folder LibriTTS_R, laid out as LibriTTS (Zen et al. 2019): train-clean-100, dev-clean,
    …, in each SPEAKER/CHAPTER/NAME.wav and NAME.normalized.txt; speakers.tsv (of doc.tar.gz) has
    reader, gender, subset and name. The reader's number is left out: it cannot be heard.
    """
    (info,) = find(root, "speakers.tsv")
    _, *lines = info.read_text(encoding="utf-8").splitlines()
    genders = {line.split("\t")[0].strip(): line.split("\t")[1].strip() for line in lines if line}
    names = {"train": "train", "dev": "validation", "test": "test"}
    for path in find(root, "*-*/*/*/*.wav"):
        subset, speaker, *_ = path.relative_to(root).parts
        attributes = {"Gender": GENDERS.get(genders.get(speaker))}
        text = beside(path.with_suffix(".normalized.txt"))
        yield Clip(path, "speech", attributes, text, speaker, names[subset.split("-")[0]])


# -- what the functions above share ----------------------------------------------------------------

GENDERS = {"F": "Female", "M": "Male"}


def find(root, pattern):
    """The paths of that pattern, sorted. FileNotFoundError where there is none."""
    paths = sorted(root.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"{root} has no {pattern}")
    return paths


def table(root, name):
    """Rows of a .csv or .tsv with a header, as dicts. Quotes mean nothing in a .tsv."""
    (path,) = find(root, name)
    dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file, **dialect)


def beside(path):
    """The text of a transcript's file; "" where there is none."""
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


# -- the frame: listen to every clip, sort out, split, write ---------------------------------------

SILENT = 1e-4  # standard deviation of the waveform; there is nothing to hear below it
TEST_SHARE = 0.15
SAME_SOUND = 0.9  # correlation of log-mels from which two clips are taken for one recording
MOST_COMPARED = 1_000, 10_000  # clips of a label, of a corpus; beyond, by file: it would take long


@dataclasses.dataclass(slots=True)
class Heard:
    problem: str = ""  # missing, broken, silent
    detail: str = ""
    seconds: float = 0.0
    sha256: str = ""  # of the samples: the same for a copy in another lossless format
    mel: torch.Tensor | None = None


def listen(clip, keep_mel, warn):
    """Decode one clip as load_audio does.  -> Heard

    At its own rate: resampling every clip to 16 kHz would take three times as long.
    """
    if clip.problem:
        return Heard(clip.problem)
    if not clip.path.is_file():
        return Heard("missing")
    try:
        samples, rate = read_sound(clip.path, warn=warn)
    except (OSError, ValueError) as error:
        why = str(error).removeprefix(f"{clip.path} ").partition(": ")[0]
        return Heard("broken", why)
    mono = samples.mean(1)
    if not (abs(mono) < 1e12).all():
        return Heard("broken", "holds NaN, infinite or absurdly large samples")
    if mono.std() < SILENT:
        return Heard("silent")
    sha256 = hashlib.sha256(mono).hexdigest()
    mel = coarse_mel(resample(torch.from_numpy(mono), rate, 16_000)) if keep_mel else None
    return Heard("", "", len(mono) / rate, sha256, mel)


def coarse_mel(waveform):
    """What clips are compared by: log-mel of 20 bands and 50 frames a second, at most 30 s of it,
    each band's mean taken out.  -> (20, n_frames), float16: up to 10,000 are kept
    """
    seconds = min(30, math.ceil(len(waveform) / 16_000))
    mel = log_mel([waveform[: 16_000 * seconds]], 80, seconds)[0]  # (80, 100 * seconds)
    mel = mel.reshape(20, 4, 50 * seconds, 2).mean((1, 3))
    mel = mel[:, : max(1, len(waveform) // 320)]  # without what was padded
    return (mel - mel.mean(1, keepdim=True)).half()


def recordings(mels):
    """Which clips share sound: cuts, louder copies, other formats of one recording.

    Two clips belong together when their log-mels correlate by more than SAME_SOUND with the shorter
    one put where it fits best into the longer one. Fourier transforms try all places at once.
    mels: list of (20, n_frames).  -> list of numbers, the same for the clips of one recording
    """
    order = sorted(range(len(mels)), key=lambda i: -mels[i].shape[1])  # the longest first
    mels = [mels[i].float() for i in order]
    longest = mels[0].shape[1]
    n_fft = 2 ** math.ceil(math.log2(2 * longest))
    spectra = torch.stack([torch.fft.rfft(mel, n_fft) for mel in mels])  # (n, 20, n_fft / 2 + 1)
    energy = torch.zeros(len(mels), longest + 1)  # of all frames before this one
    for row, mel in enumerate(mels):
        energy[row, 1 : mel.shape[1] + 1] = mel.square().sum(0)
    energy = energy.cumsum(1)
    group = list(range(len(mels)))
    for row in range(1, len(mels)):
        length, own = mels[row].shape[1], energy[row, -1]
        places = longest - length + 1
        product = (spectra[:row] * spectra[row].conj()).sum(1)  # (row, n_fft / 2 + 1)
        match = torch.fft.irfft(product, n_fft)[:, :places]
        there = energy[:row, length:] - energy[:row, :places]
        likeness = match / (own * there.clamp_min(0.1 * own)).sqrt().clamp_min(1e-9)
        for other in (likeness.amax(1) > SAME_SOUND).nonzero().flatten().tolist():
            old, new = group[row], group[other]
            group = [new if number == old else number for number in group]
    return [number for _, number in sorted(zip(order, group))]


def label(clip):
    """The first attribute: recordings are compared and held out label by label."""
    return str(next(iter(clip.attributes.values()), ""))


def find_recordings(clips, mels):
    """Name the group of each clip after the first clip of its recording."""
    members = collections.defaultdict(list)
    for i, clip in enumerate(clips):
        members[label(clip)].append(i)
    for indices in tqdm(members.values(), "comparing clips", unit=" labels", leave=False):
        numbers = range(len(indices))
        if all(mels[i] is not None for i in indices):
            numbers = recordings([mels[i] for i in indices])
        first = {}
        for i, number in zip(indices, numbers):
            path = clips[i].path
            clips[i].group = first.setdefault(number, f"{path.parent.name}/{path.stem}")


def hold_out(clips, by_label):
    """Mark whole groups, TEST_SHARE of the clips (of each label), as test and the others as train.

    A hash of the group's name decides which come first: the same choice on every machine.
    """
    strata = collections.defaultdict(collections.Counter)  # label -> group -> number of clips
    for clip in clips:
        strata[label(clip) if by_label else ""][clip.group] += 1
    test = set()
    for stratum, sizes in strata.items():
        left = math.ceil(TEST_SHARE * sum(sizes.values())) if len(sizes) > 1 else 0
        for group in sorted(sizes, key=lambda group: zlib.crc32(group.encode())):
            if sizes[group] <= left:
                test.add((stratum, group))
                left -= sizes[group]
    for clip in clips:
        stratum = label(clip) if by_label else ""
        clip.split = "test" if (stratum, clip.group) in test else "train"


def decide_splits(clips, mels, read, asked):
    """Each clip's split: as asked for, else as the release has it, else by groups."""
    by_recording = read.by == "recording" and any(not clip.split for clip in clips)
    if by_recording:
        find_recordings(clips, mels)
        if unheard := sum(mel is None for mel in mels):
            print(f"{unheard} clips, too many to compare, are split by file", file=sys.stderr)
    groups = {clip.group for clip in clips}
    if unknown := sorted(set(asked) - groups):
        some = ", ".join(sorted(groups)[:20])
        raise ValueError(f"--test: no {read.by} is called {', '.join(unknown)}; there are {some}")
    if held_out := set(asked or read.test):
        for clip in clips:
            clip.split = "test" if clip.group in held_out else "train"
    hold_out([clip for clip in clips if not clip.split], by_recording)


def read_clips(name, folder, options):
    """All clips that the corpus's tables or file names tell of, those without a label marked."""
    read = KNOWN[name]
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; {name} comes from {read.url}")
    try:
        clips = sorted(read(folder, **options), key=lambda clip: clip.path)
    except (FileNotFoundError, KeyError) as error:
        what = f"a table without {error}" if isinstance(error, KeyError) else error
        hint = f"`python corpora.py {name}` tells what is expected"
        raise ValueError(f"{folder} is not {name} as published: {what} ({hint})") from None
    for clip in clips:
        clip.attributes = {key: value for key, value in clip.attributes.items() if value}
        if not clip.text and not set(clip.attributes) - {"Duration"}:
            clip.problem = clip.problem or "unlabelled"
    return clips


def listen_to_all(clips, keep_mels):
    """-> list of Heard. Threads do: decoding, resampling and hashing leave Python alone."""
    sizes = collections.Counter(label(clip) for clip in clips)
    of_label, of_corpus = MOST_COMPARED
    keep_mels = keep_mels and len(clips) <= of_corpus
    damaged = run.Tally("damaged files, used as far as they go")
    torch.set_num_threads(1)
    with ThreadPool(run.n_cores()) as pool:
        keep = lambda clip: keep_mels and sizes[label(clip)] <= of_label
        heard = pool.imap(lambda clip: listen(clip, keep(clip), damaged.add), clips)
        heard = list(tqdm(heard, "listening", len(clips), unit=" clips"))
    damaged.close()
    return heard


def metadata(clip, heard, id, dataset):
    """One line of metadata, for generate_data.py."""
    length = f"{heard.seconds:.1f}".removesuffix(".0") + "s"  # as in AQA5M: "5s"
    attributes = {k: length if v is MEASURED else v for k, v in clip.attributes.items()}
    segment = {"start": 0.0, "end": round(heard.seconds, 2)}
    segment |= {"text": clip.text} if clip.text else {}
    segment |= {"attributes": attributes}
    row = {"id": id, "dataset": dataset, "domain": clip.domain, "group": clip.group}
    return row | {"segments": [segment]}


def make(name, folder, audio_root, asked=(), options=None):
    """Read a corpus.  -> {split: rows of metadata}, {reason: [clip that was left out: why]}"""
    read, skipped, usable = KNOWN[name], collections.defaultdict(list), []
    clips = read_clips(name, folder, options or {})
    keep_mels = read.by == "recording" and any(not clip.split for clip in clips)
    ids = {clip.path: clip.path.relative_to(audio_root).as_posix() for clip in clips}
    first = {}  # sha256 -> the clip that had it first
    # Of copies the one in the release's test part stays; else the first one.
    heard = zip(clips, listen_to_all(clips, keep_mels))
    for clip, found in sorted(heard, key=lambda pair: pair[0].split != "test"):
        same = first.setdefault(found.sha256, clip)
        if found.problem:
            why = f": {found.detail}" if found.detail else ""
            skipped[found.problem].append(ids[clip.path] + why)
        elif same is not clip:
            other = "" if same.attributes == clip.attributes else ", with other labels"
            skipped["duplicate"].append(f"{ids[clip.path]}: as {ids[same.path]}{other}")
        else:
            usable.append((clip, found))
    decide_splits([clip for clip, _ in usable], [found.mel for _, found in usable], read, asked)
    rows = collections.defaultdict(list)
    for clip, found in usable:
        rows[clip.split].append(metadata(clip, found, ids[clip.path], name))
    return rows, skipped


def label_counts(rows):
    """-> {attribute: {value: number of clips}}, without attributes of more than 100 values"""
    counts = collections.defaultdict(collections.Counter)
    for row in rows:
        for key, value in row["segments"][0]["attributes"].items():
            counts[key][value] += 1
    return {key: dict(sorted(c.items())) for key, c in counts.items() if len(c) <= 100}


def instructions(folder, out):
    """Read the authors' pool of prompts back from the rows of DeSTA-AQA5M.

    Each prompt that was drawn stands in a row. The public files know two domains: speech.*.jsonl
    gives speech.txt, audio.*.jsonl gives both sound.txt and music.txt. One prompt a line (those of
    several lines are joined), the most frequent first; counts.json tells how often.
    """
    domains = {"speech": ["speech"], "audio": ["sound", "music"]}
    files = {domain: find(folder, f"**/{domain}.*.jsonl") for domain in domains}
    counts = {domain: collections.Counter(prompts(files[domain])) for domain in domains}
    for domain, names in domains.items():
        lines = "".join(f"{prompt}\n" for prompt, _ in counts[domain].most_common())
        for name in names:
            checkpoint.write_text(out / f"{name}.txt", lines)
    often = {domain: dict(count.most_common()) for domain, count in counts.items()}
    checkpoint.write_json(out / "counts.json", often)
    return counts


def prompts(paths):
    """The prompt of every row, on one line."""
    size = sum(path.stat().st_size for path in paths)
    with tqdm(desc=paths[0].name, total=size, unit="B", unit_scale=True) as bar:
        for path in paths:
            for number, line in enumerate(path.open("rb"), 1):
                bar.update(len(line))
                try:
                    prompt = json.loads(line)["prompt"].split()
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise ValueError(f"{path}: line {number} is no row with a prompt") from None
                if prompt:
                    yield " ".join(prompt)


# -- command line ----------------------------------------------------------------------------------


def about(name):
    """What is known of a corpus, and how its folder is laid out."""
    read = KNOWN[name]
    held_out = " ".join(read.test) or f"{TEST_SHARE:.0%}, or as the release has it"
    facts = f"from:    {read.url}\nlicence: {read.licence}\ntest:    by {read.by} ({held_out})"
    return f"{name}\n{facts}\n\n{inspect.cleandoc(read.__doc__)}"


def listing():
    for name, read in KNOWN.items():
        yield f"{name:16}{read.__doc__.splitlines()[0]}"
        yield f"{'':16}{read.url}"
        yield f"{'':16}{read.licence}"
    yield "python corpora.py NAME: its layout; python corpora.py NAME FOLDER --out FILE: read it"


def write(out, rows, skipped, facts):
    """Write OUT.train.metadata.jsonl, … and OUT.report.json.  -> what they hold, in one line"""
    stem = out.name.removesuffix(".jsonl").removesuffix(".metadata")
    for split in ("train", "validation", "test"):  # an earlier reading may have split otherwise
        out.with_name(f"{stem}.{split}.metadata.jsonl").unlink(missing_ok=True)
    for split, lines in rows.items():
        checkpoint.write_jsonl(out.with_name(f"{stem}.{split}.metadata.jsonl"), lines)
    counts = {
        "rows": {split: len(lines) for split, lines in rows.items()},
        "skipped": {reason: len(clips) for reason, clips in skipped.items()},
        "labels": {split: label_counts(lines) for split, lines in rows.items()},
    }
    report = out.with_name(f"{stem}.report.json")
    checkpoint.write_json(report, facts | counts | {"skipped clips": skipped})
    parts = ", ".join(f"{n} {split}" for split, n in counts["rows"].items()) or "no clip"
    left_out = ", ".join(f"{n} {reason}" for reason, n in counts["skipped"].items()) or "none"
    return f"{out.with_name(stem)}.*: {parts}; skipped: {left_out} ({report.name})"


def main():
    if len(sys.argv) == 1:
        return print("\n".join(listing()))
    if len(sys.argv) == 2 and sys.argv[1] in KNOWN:
        return print(about(sys.argv[1]))
    s = run.parse_settings(Settings, __doc__)
    start, folder = time.time(), Path(s.folder).resolve()
    if s.corpus == "instructions":
        out = Path(s.out or "instructions")
        for domain, counts in instructions(folder, out).items():
            print(f"{out}: {len(counts)} prompts of {domain}, in {sum(counts.values())} rows")
        return
    if s.corpus not in KNOWN:
        raise ValueError(f"{s.corpus!r} is none of {', '.join(KNOWN)}, instructions")
    audio_root = Path(s.audio_root or folder).resolve()
    if not folder.is_relative_to(audio_root):
        raise ValueError(f"--audio_root {audio_root} does not contain {folder}")
    asked = [name.strip() for name in s.test.split(",") if name.strip()]
    options = {"attribute": s.attribute, "domain": s.domain} if s.corpus == "folder" else {}
    rows, skipped = make(s.corpus, folder, audio_root, asked, options)
    read, seconds = KNOWN[s.corpus], round(time.time() - start, 1)
    facts = {"corpus": s.corpus, "url": read.url, "licence": read.licence, "split by": read.by}
    facts |= {"seconds": seconds, "run": run.description(s)}
    print(write(Path(s.out or f"{s.corpus}.metadata.jsonl"), rows, skipped, facts))
    if not rows:
        raise ValueError(f"no clip of {folder} can be used: the report tells why")


if __name__ == "__main__":
    run.main(main)
