"""corpora.py: the layouts of the corpora in miniature, what is left out and why, the splits; and
four real corpora in full.

The real ones lie in the folder that the environment variable CORPORA names; without it those tests
are skipped.
"""

import collections
import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import read_jsonl, script

import corpora

REAL = os.environ.get("CORPORA")
needs_real = pytest.mark.skipif(
    not REAL, reason="CORPORA does not name the folder of the four real corpora"
)


def noise(path, seed=None, seconds=0.5, rate=16000, silent=False, like=None):
    """Write a sound file of its own (by the path's name), in whatever format the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if like is None:
        random = np.random.default_rng(
            sum(map(ord, str(path))) * 31 + len(str(path)) if seed is None else seed
        )
        # Noise whose loudness changes all the time: plain noise sounds alike everywhere.
        envelope = np.repeat(random.uniform(0, 1, int(seconds * 20) + 1), rate // 20)[
            : int(seconds * rate)
        ]
        like = 0.3 * envelope * random.standard_normal(len(envelope)) * (not silent)
    samples = (32767 * np.clip(like, -1, 1)).astype(np.int16)  # the same values in wav and flac
    soundfile.write(path, samples, rate)
    return samples / 32767


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")


def read(name, folder, **options):
    """-> {id: (split, text, attributes)}, skipped"""
    rows, skipped = corpora.make(name, folder, folder, **options)
    found = {}
    for split, part in rows.items():
        for row in part:
            (segment,) = row["segments"]
            assert row["dataset"] == name
            assert segment["start"] == 0 < segment["end"]
            found[row["id"]] = (split, segment.get("text"), segment["attributes"])
    return found, {reason: sorted(clips) for reason, clips in skipped.items()}


# -- the documented layouts, in miniature ----------------------------------------------------------


def test_animals(tmp_path):
    for name in ("Aslan/aslan_1", "Kedi-Part1/cat_2", "Kedi-Part2/cat_100", "Zebra/zebra_1"):
        noise(tmp_path / f"{name}.wav")
    found, skipped = read("animals", tmp_path)
    assert {id: attributes for id, (_, _, attributes) in found.items()} == {
        "Aslan/aslan_1.wav": {"Animal": "lion"}, "Kedi-Part1/cat_2.wav": {"Animal": "cat"},
        "Kedi-Part2/cat_100.wav": {"Animal": "cat"},
    }  # fmt: skip
    assert skipped == {"unlabelled": ["Zebra/zebra_1.wav"]}


def test_emodb(tmp_path):
    for name in ("03a01Fa", "08b09Wb", "15a02Nc", "16b10Td", "readme"):
        noise(tmp_path / f"wav/{name}.wav")
    found, skipped = read("emodb", tmp_path)
    assert found == {
        "wav/03a01Fa.wav": (
            "train",
            "Der Lappen liegt auf dem Eisschrank.",
            {"Emotion": "Happy", "Gender": "Male"},
        ),
        "wav/08b09Wb.wav": (
            "train",
            "Ich will das eben wegbringen und dann mit Karl was trinken gehen.",
            {"Emotion": "Angry", "Gender": "Female"},
        ),
        "wav/15a02Nc.wav": (
            "test",
            "Das will sie am Mittwoch abgeben.",
            {"Emotion": "Neutral", "Gender": "Male"},
        ),
        "wav/16b10Td.wav": (
            "test",
            "Die wird auf dem Platz sein, wo wir sie immer hinlegen.",
            {"Emotion": "Sad", "Gender": "Female"},
        ),
    }
    assert skipped == {"unlabelled": ["wav/readme.wav"]}
    found, _ = read("emodb", tmp_path, asked=["03", "08"])
    assert {id[4:6]: split for id, (split, _, _) in found.items()} == {
        "03": "test",
        "08": "test",
        "15": "train",
        "16": "train",
    }
    with pytest.raises(ValueError, match="no speaker is called 99; there are 03, 08, 15, 16"):
        read("emodb", tmp_path, asked=["99"])


def test_digits(tmp_path):
    lines(tmp_path / "metadata.py", '"""Facts."""',
        "metadata = {'theo': {'gender': 'male', 'accent': 'USA/neutral'},",
          "  'lucas': {'gender': 'male', 'accent': 'DEU/German'}}")  # fmt: skip
    for name in ("7_theo_3", "0_lucas_11", "x_lucas_1", "3_nobody_0"):
        noise(tmp_path / f"recordings/{name}.wav", rate=8000)
    found, skipped = read("digits", tmp_path)
    assert found == {
        "recordings/7_theo_3.wav": ("test", "seven", {"Gender": "Male", "Accent": "American"}),
        "recordings/0_lucas_11.wav": ("train", "zero", {"Gender": "Male", "Accent": "German"}),
        "recordings/x_lucas_1.wav": ("train", None, {"Gender": "Male", "Accent": "German"}),
        "recordings/3_nobody_0.wav": ("train", "three", {}),
    }
    assert not skipped


def test_philharmonia(tmp_path):
    names = [
        "cello/cello_As3_1_piano_arco-normal", "cor anglais/english-horn_A3_05_mezzo-forte_normal",
        "percussion/tam-tam/tam-tam__long_fortissimo_damped",
        "flute/flute_A3_1_cresc-decresc_major-trill", "flute/odd",
    ]  # fmt: skip
    for name in names:
        noise(tmp_path / f"audio/{name}.mp3", rate=44100)
    found, skipped = read("philharmonia", tmp_path)
    assert [attributes for _, _, attributes in found.values() if "Dynamics" in attributes] == [
        a for _, _, a in found.values()
    ]
    by_name = {Path(id).stem: attributes for id, (_, _, attributes) in found.items()}
    assert by_name == {
        "cello_As3_1_piano_arco-normal": {"Instrument": "cello", "Note": "A#3", "Dynamics": "soft",
            "Articulation": "bowed"},
        "english-horn_A3_05_mezzo-forte_normal": {"Instrument": "english horn", "Note": "A3",
            "Dynamics": "moderately loud"},
        "tam-tam__long_fortissimo_damped": {"Instrument": "tam-tam", "Dynamics": "very loud",
            "Articulation": "damped"},
        "flute_A3_1_cresc-decresc_major-trill":
            {"Instrument": "flute", "Note": "A3", "Dynamics": "getting louder, then softer",
                "Articulation": "major trill"},
    }  # fmt: skip
    assert skipped == {"unlabelled": ["audio/flute/odd.mp3"]}


def asterisk_packages(root):
    sounds, docs = root / "usr/share/asterisk/sounds", root / "usr/share/doc"
    for code, voice, extra in (
        ("en", "en_US_f_Allison", "; Core Sounds\n\n"),
        ("it", "it_IT_m_Carlo", "\ufeff"),
    ):
        book = docs / f"asterisk-core-sounds-{code}/core-sounds-{code}.txt.gz"
        book.parent.mkdir(parents=True)
        text = (
            f"{extra}added: Added, {code}.\nbeep: [a tone]\n"
            f"digits/1: ... one {code} (a tone: long)\ngone: Gone.\n"
        )
        book.write_bytes(gzip.compress(text.encode()))
        for name in ("added", "beep", "digits/1", "extra"):
            noise(sounds / voice / f"{name}.wav", rate=8000)


def test_asterisk(tmp_path):
    asterisk_packages(tmp_path)
    found, skipped = read("asterisk", tmp_path)
    sounds = "usr/share/asterisk/sounds"
    assert {id: (text, attributes) for id, (_, text, attributes) in found.items()} == {
        f"{sounds}/en_US_f_Allison/added.wav": (
            "Added, en.",
            {"Language": "English", "Gender": "Female"},
        ),
        f"{sounds}/en_US_f_Allison/digits/1.wav": (
            "one en",
            {"Language": "English", "Gender": "Female"},
        ),
        f"{sounds}/it_IT_m_Carlo/added.wav": (
            "Added, it.",
            {"Language": "Italian", "Gender": "Male"},
        ),
        f"{sounds}/it_IT_m_Carlo/digits/1.wav": (
            "one it",
            {"Language": "Italian", "Gender": "Male"},
        ),
    }
    voices = ("en_US_f_Allison", "it_IT_m_Carlo")
    assert skipped == {
        "missing": [f"{sounds}/{voice}/gone.wav" for voice in voices],
        "unlabelled": [
            f"{sounds}/{voice}/{name}.wav" for voice in voices for name in ("beep", "extra")
        ],
    }
    splits = collections.defaultdict(set)
    for id, (split, _, _) in found.items():
        splits[Path(id).stem].add(split)
    assert all(
        len(of_prompt) == 1 for of_prompt in splits.values()
    )  # held out in every language or in none


def test_folder(tmp_path):
    for name in (
        "door_knock/a.wav",
        "door_knock/deep/b.flac",
        "bell/c.ogg",
        "bell/d.WAV",
        "stray.wav",
    ):
        noise(tmp_path / name)
    lines(tmp_path / "bell/notes.txt", "not a sound")
    found, skipped = read("folder", tmp_path, options={"attribute": "Thing", "domain": "sound"})
    assert {id: attributes for id, (_, _, attributes) in found.items()} == {
        "door_knock/a.wav": {"Thing": "door knock"}, "door_knock/deep/b.flac": {"Thing": "door knock"},
        "bell/c.ogg": {"Thing": "bell"}, "bell/d.WAV": {"Thing": "bell"},
    }  # fmt: skip
    assert skipped == {"unlabelled": ["stray.wav"]}


def test_folder_with_a_split(tmp_path):
    for name in ("train/dog/1.wav", "train/cat/1.wav", "test/dog/1.wav", "validation/cat/2.wav"):
        noise(tmp_path / name)
    found, _ = read("folder", tmp_path)
    assert {id: (split, *attributes.values()) for id, (split, _, attributes) in found.items()} == {
        "train/dog/1.wav": ("train", "dog"), "train/cat/1.wav": ("train", "cat"),
        "test/dog/1.wav": ("test", "dog"), "validation/cat/2.wav": ("validation", "cat"),
    }  # fmt: skip


def test_esc50(tmp_path):
    lines(tmp_path / "meta/esc50.csv", "filename,fold,target,category,esc10,src_file,take",
          "1-100032-A-0.wav,1,0,dog,True,100032,A", "5-9032-A-0.wav,5,30,door_wood_knock,False,9032,A",
          "1-1-A-1.wav,1,1,rooster,False,1,A", "1-2-A-1.wav,1,1,,False,2,A")  # fmt: skip
    for name in ("1-100032-A-0", "5-9032-A-0", "1-2-A-1"):
        noise(tmp_path / f"audio/{name}.wav", seconds=5)
    found, skipped = read("esc50", tmp_path)
    assert found == {
        "audio/1-100032-A-0.wav": ("train", None, {"Audio category": "dog", "Duration": "5s"}),
        "audio/5-9032-A-0.wav": (
            "test",
            None,
            {"Audio category": "door_wood_knock", "Duration": "5s"},
        ),
    }
    assert skipped == {"missing": ["audio/1-1-A-1.wav"], "unlabelled": ["audio/1-2-A-1.wav"]}


def test_fsd50k(tmp_path):
    truth = tmp_path / "FSD50K.ground_truth"
    lines(
        truth / "dev.csv",
        "fname,labels,mids,split",
        '64760,"Electric_guitar,Guitar,Music","/m/1,/m/2,/m/3",train',
        '16399,"Bark,Dog","/m/4,/m/5",val',
    )
    lines(truth / "eval.csv", "fname,labels,mids", '37199,"Rain","/m/6"')
    for name in ("dev_audio/64760", "dev_audio/16399", "eval_audio/37199"):
        noise(tmp_path / f"FSD50K.{name}.wav")
    assert read("fsd50k", tmp_path) == ({
        "FSD50K.dev_audio/64760.wav": ("train", None, {"Type": "Electric guitar, Guitar, Music"}),
        "FSD50K.dev_audio/16399.wav": ("validation", None, {"Type": "Bark, Dog"}),
        "FSD50K.eval_audio/37199.wav": ("test", None, {"Type": "Rain"}),
    }, {})  # fmt: skip


def test_clotho(tmp_path):
    for part in ("development", "validation", "evaluation"):
        lines(
            tmp_path / f"clotho_captions_{part}.csv",
            "file_name,caption_1,caption_2",
            f'{part} a.wav,"A dog, it barks.",Another',
        )
        noise(tmp_path / f"{part}/{part} a.wav")
    found, _ = read("clotho", tmp_path)
    caption = {"": "A dog, it barks."}
    assert found == {
        "development/development a.wav": ("train", None, caption),
        "validation/validation a.wav": ("validation", None, caption),
        "evaluation/evaluation a.wav": ("test", None, caption),
    }  # fmt: skip


def test_nsynth(tmp_path):
    for part, qualities in (("train", ["dark", "percussive"]), ("valid", []), ("test", [])):
        facts = {"instrument_str": f"bass_electronic_{part}", "instrument_family_str": "bass",
            "instrument_source_str": "electronic",
                 "pitch": 22, "velocity": 100, "qualities_str": qualities}  # fmt: skip
        lines(
            tmp_path / f"nsynth-{part}/examples.json", json.dumps({f"bass_{part}-022-100": facts})
        )
        noise(tmp_path / f"nsynth-{part}/audio/bass_{part}-022-100.wav")
    lines(tmp_path / "nsynth-train.jsonwav.tar.gz", "the archive may lie beside")
    found, _ = read("nsynth", tmp_path)
    facts = {"Family": "bass", "Source": "electronic", "MIDI Note": "022", "MIDI Velocity": "100"}
    assert found == {
        "nsynth-train/audio/bass_train-022-100.wav": (
            "train",
            None,
            facts | {"Qualities": "dark, percussive"},
        ),
        "nsynth-valid/audio/bass_valid-022-100.wav": ("validation", None, facts),
        "nsynth-test/audio/bass_test-022-100.wav": ("test", None, facts),
    }


def test_gtzan(tmp_path):
    for name in (
        "blues/blues.00000.au",
        "blues/blues.00001.au",
        "jazz/jazz.00054.wav",
        "jazz/jazz.00055.wav",
    ):
        noise(tmp_path / f"genres/{name}", rate=22050)
    found, _ = read("gtzan", tmp_path)
    assert [attributes["Genre"] for _, _, attributes in found.values()].count("jazz") == 2
    lines(tmp_path / "train_filtered.txt", "blues/blues.00000.au")
    lines(tmp_path / "valid_filtered.txt", "blues/blues.00001.au")
    lines(tmp_path / "test_filtered.txt", "jazz/jazz.00054.au")
    found, skipped = read("gtzan", tmp_path)
    assert {id: (split, attributes["Genre"]) for id, (split, _, attributes) in found.items()} == {
        "genres/blues/blues.00000.au": ("train", "blues"),
        "genres/blues/blues.00001.au": ("validation", "blues"),
        "genres/jazz/jazz.00054.wav": ("test", "jazz"),
    }  # fmt: skip
    assert skipped == {"faulty or an artist's surplus": ["genres/jazz/jazz.00055.wav"]}


def test_common_voice(tmp_path):
    header = (
        "client_id\tpath\tsentence_id\tsentence\tsentence_domain\tup_votes\tdown_votes\t"
        "age\tgender\taccents\tvariant\tlocale\tsegment"
    )
    for part, facts in (
        ("train", "thirties\tmale_masculine\tUnited States English"),
        ("dev", "\t\t"),
        ("test", "teens\tfemale_feminine\t"),
    ):
        lines(
            tmp_path / f"{part}.tsv",
            header,
            f'{part} speaker\tcv_{part}.mp3\t1\t"Yes, he said.\t\t2\t0\t{facts}\t\ten\t',
        )
        noise(tmp_path / f"clips/cv_{part}.mp3", seconds=1, rate=48000)
    found, _ = read("common_voice", tmp_path)
    attributes = {
        split: {k: v for k, v in a.items() if k != "Duration"}
        for split, text, a in found.values()
        if text == '"Yes, he said.'
    }
    assert attributes == {
        "train": {"Gender": "male_masculine", "Age": "thirties", "Accent": "United States English"},
        "validation": {}, "test": {"Gender": "female_feminine", "Age": "teens"},
    }  # fmt: skip
    assert all(a["Duration"].startswith("1") for _, _, a in found.values())


def test_vctk(tmp_path):
    lines(tmp_path / "speaker-info.txt", "ID  AGE  GENDER  ACCENTS  REGION COMMENTS ",
        "p225  23  F    English    Southern  England",
          "p335  25  F    NewZealand English",
          "p280  21  F    French    Unknown France (mic2 files unavailable)")  # fmt: skip
    for speaker in ("p225", "p335", "p280"):
        for mic in (1, 2):
            noise(
                tmp_path / f"wav48_silence_trimmed/{speaker}/{speaker}_001_mic{mic}.flac",
                rate=48000,
            )
    lines(tmp_path / "txt/p225/p225_001.txt", "Please call Stella.")
    found, _ = read("vctk", tmp_path)
    assert {id: (text, attributes) for id, (_, text, attributes) in found.items()} == {
        "wav48_silence_trimmed/p225/p225_001_mic1.flac": (
            "Please call Stella.",
            {"Gender": "Female", "Accent": "english", "Age": "23"},
        ),
        "wav48_silence_trimmed/p335/p335_001_mic1.flac": (
            None,
            {"Gender": "Female", "Accent": "newzealand", "Age": "25"},
        ),
        "wav48_silence_trimmed/p280/p280_001_mic1.flac": (
            None,
            {"Gender": "Female", "Accent": "french", "Age": "21"},
        ),
    }


def test_crema_d(tmp_path):
    lines(
        tmp_path / "VideoDemographics.csv",
        '"ActorID","Age","Sex","Race","Ethnicity"',
        '1001,51,"Male","Caucasian","Not Hispanic"',
    )
    noise(tmp_path / "AudioWAV/1001_DFA_ANG_XX.wav")
    lines(
        tmp_path / "AudioWAV/1001_IEO_HAP_LO.wav",
        "version https://git-lfs.github.com/spec/v1",
        "oid sha256:0",
    )
    found, skipped = read("crema_d", tmp_path)
    facts = {
        "Emotion": "Anger",
        "Gender": "Male",
        "Age": "51",
        "Race": "Caucasian",
        "Ethnicity": "Not Hispanic",
    }
    assert found == {"AudioWAV/1001_DFA_ANG_XX.wav": ("train", "Don't forget a jacket.", facts)}
    assert list(skipped) == ["broken"]
    assert skipped["broken"][0].startswith("AudioWAV/1001_IEO_HAP_LO.wav: cannot be decoded")


def test_speech_commands(tmp_path):
    lines(tmp_path / "validation_list.txt", "yes/b_nohash_0.wav")
    lines(tmp_path / "testing_list.txt", "no/c_nohash_1.wav")
    for name in (
        "yes/a_nohash_0",
        "yes/b_nohash_0",
        "no/c_nohash_1",
        "_background_noise_/pink_noise",
    ):
        noise(tmp_path / f"{name}.wav", seconds=1)
    assert read("speech_commands", tmp_path) == ({
        "yes/a_nohash_0.wav": ("train", "yes", {"Command": "yes", "Duration": "1s"}),
        "yes/b_nohash_0.wav": ("validation", "yes", {"Command": "yes", "Duration": "1s"}),
        "no/c_nohash_1.wav": ("test", "no", {"Command": "no", "Duration": "1s"}),
    }, {})  # fmt: skip


def test_libritts_r(tmp_path):
    lines(tmp_path / "speakers.tsv", "READER\tGENDER\tSUBSET\tNAME",
        "84\tF\tdev-clean\tChristie Nowak", "103\tF\ttrain-clean-100\tKaren Savage",
          "61\tM\ttest-clean\tPaul-Gabriel Wiener")  # fmt: skip
    for name in (
        "dev-clean/84/121123/84_121123_000008_000000",
        "train-clean-100/103/1240/103_1240_0_0",
        "test-clean/61/70968/61_70968_0_0",
    ):
        noise(tmp_path / f"{name}.wav", rate=24000)
        lines(tmp_path / f"{name}.normalized.txt", f"Text of {name[:3]}.")
    found, _ = read("libritts_r", tmp_path)
    assert sorted((split, text, a["Gender"]) for split, text, a in found.values()) == [
        ("test", "Text of tes.", "Male"), ("train", "Text of tra.", "Female"),
        ("validation", "Text of dev.", "Female"),
    ]  # fmt: skip


def test_every_corpus_has_a_test_above():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert set(corpora.KNOWN) <= tested


# -- what is left out, and why ---------------------------------------------------------------------


def test_clips_that_cannot_be_used_are_listed_by_reason(tmp_path):
    sound = noise(tmp_path / "dog/good.wav")
    noise(tmp_path / "dog/silent.wav", silent=True)
    lines(tmp_path / "dog/broken.wav", "no sound at all")
    (tmp_path / "dog/empty.wav").touch()
    data = (tmp_path / "dog/good.wav").read_bytes()
    (tmp_path / "dog/short.wav").write_bytes(data[: len(data) // 3])
    soundfile.write(tmp_path / "dog/nan.wav", np.full(8000, np.nan), 16000, subtype="FLOAT")
    shutil.copy(tmp_path / "dog/good.wav", tmp_path / "dog/same_bytes.wav")
    noise(tmp_path / "cat/same_sound.flac", like=sound)
    noise(tmp_path / "cat/other.wav")
    found, skipped = read("folder", tmp_path)
    assert set(found) == {"cat/same_sound.flac", "cat/other.wav"}
    assert [line.split(":")[0] for line in skipped.pop("broken")] == [
        "dog/broken.wav",
        "dog/empty.wav",
        "dog/nan.wav",
        "dog/short.wav",
    ]
    assert skipped == {
        "silent": ["dog/silent.wav"],
        "duplicate": [
            "dog/good.wav: as cat/same_sound.flac, with other labels",
            "dog/same_bytes.wav: as cat/same_sound.flac, with other labels",
        ],
    }


def test_of_copies_the_one_in_the_test_part_stays(tmp_path):
    for part in ("development", "validation", "evaluation"):
        lines(
            tmp_path / f"clotho_captions_{part}.csv",
            "file_name,caption_1",
            "a.wav,A dog.",
            "b.wav,A cat.",
        )
        noise(tmp_path / f"{part}/a.wav", seed=0)
        noise(tmp_path / f"{part}/b.wav")
    found, skipped = read("clotho", tmp_path)
    assert set(found) == {
        "development/b.wav",
        "validation/b.wav",
        "evaluation/a.wav",
        "evaluation/b.wav",
    }
    assert skipped == {
        "duplicate": [
            "development/a.wav: as evaluation/a.wav",
            "validation/a.wav: as evaluation/a.wav",
        ]
    }


# -- splits ----------------------------------------------------------------------------------------


def clips_of(**groups):
    return [
        corpora.Clip(Path(f"{group}/{i}.wav"), "sound", {"Label": "x"}, group=group)
        for group, n in groups.items()
        for i in range(n)
    ]


def test_a_group_is_never_on_both_sides_and_the_share_is_kept():
    clips = clips_of(**{f"speaker{i}": 7 for i in range(40)})
    corpora.hold_out(clips, by_label=False)
    sides = collections.defaultdict(set)
    for clip in clips:
        sides[clip.group].add(clip.split)
    assert all(len(side) == 1 for side in sides.values())
    share = sum(clip.split == "test" for clip in clips) / len(clips)
    assert abs(share - corpora.TEST_SHARE) < 0.03
    held_out = {clip.group for clip in clips if clip.split == "test"}
    corpora.hold_out(clips[::-1], by_label=False)  # the order of the clips does not matter
    assert {clip.group for clip in clips if clip.split == "test"} == held_out


def test_each_label_keeps_clips_to_train_on():
    clips = clips_of(one=1) + clips_of(a=1, b=1)
    clips[0].attributes = {"Label": "lonely"}
    corpora.hold_out(clips, by_label=True)
    assert [clip.split for clip in clips].count("test") == 1
    assert clips[0].split == "train"


def test_cuts_and_copies_of_a_recording_stay_together(tmp_path):
    random = np.random.default_rng(0)
    for i in range(20):
        sound = noise(tmp_path / f"bird/{i}.wav", seed=i, seconds=2)
        cut = 0.4 * sound[8000:24000] + 0.001 * random.standard_normal(
            16000
        )  # quieter, from its middle, with noise
        noise(tmp_path / f"bird/{i}_cut.wav", like=cut)
    rows, skipped = corpora.make("folder", tmp_path, tmp_path)
    assert not skipped
    assert 4 <= len(rows["test"]) <= 8
    groups = {row["id"]: row["group"] for part in rows.values() for row in part}
    for i in range(20):
        assert groups[f"bird/{i}.wav"] == groups[f"bird/{i}_cut.wav"]
    assert len(set(groups.values())) == 20  # and strangers stay apart
    assert not {row["group"] for row in rows["train"]} & {row["group"] for row in rows["test"]}


def test_too_many_to_compare(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpora, "MOST_COMPARED", (2, 100))
    for i in range(3):
        noise(tmp_path / f"bird/{i}.wav")
    rows, _ = corpora.make("folder", tmp_path, tmp_path)
    assert {len(rows["train"]), len(rows["test"])} == {2, 1}
    assert "3 clips, too many to compare, are split by file" in capsys.readouterr().err


# -- the command -----------------------------------------------------------------------------------


def test_command_writes_metadata_and_report(tmp_path):
    for name in ("03a01Fa", "15a02Nc"):
        noise(tmp_path / f"data/emodb/wav/{name}.wav")
    lines(tmp_path / "data/emodb/wav/16a02Nc.wav", "broken")
    out = tmp_path / "out/emodb.metadata.jsonl"
    # of an earlier reading with another split: its clip may be trained on now
    lines(out.with_name("emodb.validation.metadata.jsonl"), "old")
    ran = script(
        "corpora.py",
        "emodb",
        tmp_path / "data/emodb",
        "--out",
        out,
        "--audio_root",
        tmp_path / "data",
    )
    assert ran.status == 0, ran.err
    assert "1 train, 1 test; skipped: 1 broken (emodb.report.json)" in ran.out
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "emodb.report.json",
        "emodb.test.metadata.jsonl",
        "emodb.train.metadata.jsonl",
    ]
    (row,) = read_jsonl(out.with_name("emodb.train.metadata.jsonl"))
    assert row == {
        "id": "emodb/wav/03a01Fa.wav", "dataset": "emodb", "domain": "speech", "group": "03",
        "segments": [{"start": 0.0, "end": 0.5, "text": "Der Lappen liegt auf dem Eisschrank.",
            "attributes": {"Emotion": "Happy", "Gender": "Male"}}],
    }  # fmt: skip
    report = json.loads(out.with_name("emodb.report.json").read_text())
    assert report["rows"] == {"train": 1, "test": 1}
    assert report["labels"]["test"] == {
        "Emotion": {"Neutral": 1},
        "Gender": {"Male": 1},
    }
    assert report["skipped"] == {"broken": 1}
    assert report["skipped clips"]["broken"][0].startswith("emodb/wav/16a02Nc.wav: ")


def test_command_lists_and_explains():
    listed = script("corpora.py")
    assert listed.status == 0
    for name, reader in corpora.KNOWN.items():
        assert name in listed.out
        assert reader.url in listed.out
        assert reader.licence in listed.out
    told = script("corpora.py", "esc50").out
    assert "meta/esc50.csv" in told
    assert "CC BY-NC 3.0" in told


@pytest.mark.parametrize("arguments, message", [
    (["nothing", "."], "'nothing' is none of animals, emodb"),
    (["esc50", "missing"], "missing is no folder; esc50 comes from https://github.com/karolpiczak/ESC-50"),
    (["esc50", "."],
        r"is not esc50 as published: .* has no meta/esc50.csv "
        r"(`python corpora.py esc50` tells what is expected)"),
    (["esc50", "columns"], r"a table without 'category'"),
    (["emodb", "broken"], "can be used: the report tells why"),
    (["esc50", ".", "--audio_root", "columns"], "does not contain"),
    (["instructions", "."], "has no **/speech.*.jsonl"),
])  # fmt: skip
def test_command_says_what_is_wrong(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "columns/meta/esc50.csv", "filename,fold", "a.wav,1")
    lines(tmp_path / "broken/wav/03a01Fa.wav", "no sound")
    ran = script("corpora.py", *arguments)
    assert ran.status == 1
    assert "Traceback" not in ran.err
    error = ran.err.strip().splitlines()[-1]
    for part in message.split(".* "):
        assert part.removeprefix("r") in error, error


def test_instructions(tmp_path):
    def rows(*prompts):
        return [json.dumps({"id": "x", "prompt": prompt, "response": "…"}) for prompt in prompts]

    lines(tmp_path / "aqa/speech.0.jsonl", *rows("Who speaks?", "Sing it.", "Who speaks?"))
    lines(
        tmp_path / "aqa/speech.1.jsonl", *rows("Sing it.", "Who speaks?\nIn one word.", "Sing it.")
    )
    lines(tmp_path / "aqa/audio.0.jsonl", *rows("What is heard?"))
    ran = script("corpora.py", "instructions", tmp_path / "aqa", "--out", tmp_path / "pool")
    assert ran.status == 0
    assert "3 prompts of speech, in 6 rows" in ran.out
    assert (tmp_path / "pool/speech.txt").read_text().splitlines() == [
        "Sing it.",
        "Who speaks?",
        "Who speaks? In one word.",
    ]
    assert (
        (tmp_path / "pool/sound.txt").read_text()
        == (tmp_path / "pool/music.txt").read_text()
        == "What is heard?\n"
    )
    counts = json.loads((tmp_path / "pool/counts.json").read_text())
    assert counts == {
        "speech": {"Sing it.": 3, "Who speaks?": 2, "Who speaks? In one word.": 1},
        "audio": {"What is heard?": 1},
    }
    lines(tmp_path / "aqa/audio.0.jsonl", *rows("What is heard?"), '{"prompt": "cut of')
    ran = script("corpora.py", "instructions", tmp_path / "aqa", "--out", tmp_path / "pool")
    assert ran.status == 1
    assert "audio.0.jsonl: line 2 is no row with a prompt" in ran.err


# -- four real corpora, in full --------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    """A function: name -> rows, skipped, as read from the real corpus of that name."""
    folders = {
        "animals": "Animal-Sound-Dataset",
        "emodb": "emodb",
        "digits": "free-spoken-digit-dataset",
        "philharmonia": "philharmonia-samples",
    }
    return lambda name: corpora.make(name, Path(REAL, folders[name]), Path(REAL))


def counts(rows, attribute):
    return collections.Counter(row["segments"][0]["attributes"].get(attribute) for row in rows)


def everything_is_accounted_for(rows, skipped, pattern):
    """Each file is in one part or in one list, and no group on both sides."""
    used = [row["id"] for part in rows.values() for row in part]
    left_out = [line.split(":")[0] for clips in skipped.values() for line in clips]
    assert sorted(used + left_out) == sorted(
        path.relative_to(REAL).as_posix() for path in Path(REAL).glob(pattern)
    )
    assert not {row["group"] for row in rows["train"]} & {row["group"] for row in rows["test"]}


@needs_real
def test_real_emodb(real):
    rows, skipped = real("emodb")
    everything_is_accounted_for(rows, skipped, "emodb/wav/*.wav")
    assert not skipped
    assert (len(rows["train"]), len(rows["test"])) == (408, 127)
    emotions = {
        "Angry": 127,
        "Bored": 81,
        "Disgusted": 46,
        "Fearful": 69,
        "Happy": 71,
        "Neutral": 79,
        "Sad": 62,
    }  # as published
    assert counts(rows["train"] + rows["test"], "Emotion") == emotions
    assert counts(rows["test"], "Gender") == {"Female": 71, "Male": 56}
    assert {row["group"] for row in rows["test"]} == {"15", "16"}
    assert all(row["segments"][0]["text"].endswith((".", "?")) for row in rows["train"])


@needs_real
def test_real_digits(real):
    rows, skipped = real("digits")
    everything_is_accounted_for(rows, skipped, "free-spoken-digit-dataset/recordings/*.wav")
    assert not skipped
    assert (len(rows["train"]), len(rows["test"])) == (600, 120)
    assert counts(rows["train"], "Accent") == {
        "American": 120,
        "French": 120,
        "German": 240,
        "Greek": 120,
    }
    assert collections.Counter(row["segments"][0]["text"] for row in rows["test"])["seven"] == 12


@needs_real
def test_real_animals(real):
    rows, skipped = real("animals")
    everything_is_accounted_for(rows, skipped, "Animal-Sound-Dataset/*/*.wav")
    assert len(skipped["duplicate"]) >= 36
    assert set(skipped) <= {"duplicate", "broken"}
    train, test = counts(rows["train"], "Animal"), counts(rows["test"], "Animal")
    assert len(train) == len(test) == 10
    assert all(3 <= test[animal] <= train[animal] / 3 for animal in train)
    groups = {row["id"].split("/")[-1]: row["group"] for part in rows.values() for row in part}
    assert groups["dog_164.wav"] == groups["dog_140.wav"]  # one is cut out of the other
    assert groups["tavuk_14.wav"] == groups["tavuk_11.wav"] != groups["tavuk_20.wav"]


@needs_real
def test_real_philharmonia(real):
    rows, skipped = real("philharmonia")
    everything_is_accounted_for(rows, skipped, "philharmonia-samples/audio/**/*.mp3")
    assert len(skipped["broken"]) == 1
    assert "saxophone_Fs3_15_fortissimo_normal.mp3" in skipped["broken"][0]  # an empty file
    assert not {"piano", "forte"} & set(counts(rows["train"], "Dynamics"))
    notes = {
        part: {row["segments"][0]["attributes"].get("Note") for row in rows[part]} - {None}
        for part in rows
    }
    assert not notes["train"] & notes["test"]
    assert len(notes["test"]) >= 8
    pitched = counts(rows["train"], "Instrument").keys() & counts(rows["test"], "Instrument").keys()
    assert len(pitched) >= 15
    assert 0.1 < len(rows["test"]) / 1004 < 0.2
