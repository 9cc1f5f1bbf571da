"""
model.py: DeSTA2.5-Audio, the three parts joined (paper sections 3 and 4).

  audio -> Whisper encoder (frozen) -> four taps -> Q-Former (trained) -> 64 vectors ┐
        -> Whisper decoder (frozen) -> transcript ───────────────────────────────────┴> LLM (frozen)

The heart is `build_prompt`: one chat prompt with one slot for the clip. Filled with a description
in words, the LLM writes the training targets. Filled with the audio vectors and the transcript, the
same LLM has to give the same answers.

    python model.py clip.wav                                    # a conversation about the clip
    python model.py clip.wav --prompt "What do you hear?"       # one answer
    python model.py clip.wav --adapter DIR --llm Llama-3.1-8B-Instruct --whisper whisper-large-v3
"""

import math
import re
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from engine import fast, run
from engine.checkpoint import load_tensors, read_record, save_tensors, write_record
from engine.rows import audio_file
from engine.run import argument, compute_dtype, default_device, setting
from engine.weights import check_fit, read_json
from llama import Llama, add_lora, generate
from qformer import QFormer, QFormerConfig
from recipes import GENERATE_DATA
from tokenizer import Tokenizer
from whisper import SAMPLE_RATE, Whisper, load_audio, log_mel, tap_layers

AUDIO, START, END = "<|AUDIO|>", "<start_audio>", "<end_audio>"
AUDIO_ID = -1  # stands for one audio vector among token ids; never reaches the embedding table
NO_ADAPTER = "train an adapter with `torchrun train.py`, or download the released one"
MAX_TRANSCRIPT = 100  # tokens per window
PRECISION, LONG = ("fast", "official"), ("cut", "split")
ADAPTER_PREFIX, LLM_PREFIX = "perception.connector.", "llm_model."  # in the official checkpoint


# --------------------------------------------------------------------------------------------------
# The prompt


def audios_of(messages):
    """All audios of a conversation, in order. ValueError where <|AUDIO|> and audios do not
    match.
    """
    audios = []
    for i, message in enumerate(messages):
        role, given = message["role"], message.get("audios") or []
        n_slots = message["content"].count(AUDIO)
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"message {i}: the role is {role!r}, not system, user or assistant")
        if n_slots != len(given):
            raise ValueError(f"message {i} ({role}) has {n_slots} {AUDIO} but {len(given)} audios")
        audios += given
    return audios


def build_prompt(tokenizer, messages, fill):
    """THE HEART OF THE METHOD: one chat prompt, whose audio slots can be filled in two ways.

    messages: the official form (see DeSTA.generate). fill: audio dict -> list of token ids, one of
        description_slot(tokenizer)       in words: the LLM reads this when it writes the target
        audio_slot(tokenizer, n_vectors)  in sound: AUDIO_ID for each vector, then the transcript
        lambda audio: []                  nothing: how much can be guessed without the clip
    -> token ids. Everything outside the slots is the same, token for token, whatever fills them:
    the text before and after a slot is tokenized on its own.
    """
    audios = audios_of(messages)
    # Training files carry the delimiters, hand-written prompts do not: both become the same text.
    slot = re.compile(f"(?:{START})?{re.escape(AUDIO)}(?:{END})?")
    with_delimiters = lambda text: slot.sub(START + AUDIO + END, text)
    chat = [{"role": m["role"], "content": with_delimiters(m["content"])} for m in messages]
    before, *after = tokenizer.apply_chat_template(chat).split(AUDIO)
    ids = tokenizer.encode(before)
    for audio, text in zip(audios, after, strict=True):
        ids += fill(audio) + tokenizer.encode(text)
    return ids


def description_slot(tokenizer):
    return lambda audio: tokenizer.encode(audio["description"], special=False)


def audio_slot(tokenizer, n_vectors):
    def fill(audio):
        if not isinstance(audio.get("text"), str):
            remedy = 'give "text" (generate_data.py writes it; DeSTA.generate lets Whisper)'
            raise ValueError(f"{audio.get('audio')} has no transcript: {remedy}")
        n_windows = audio.get("windows", 1)  # more with --long_audio split
        # special=False: "<|im_end|>" in a transcript was said, and ends no turn.
        transcript = tokenizer.encode(audio["text"], special=False)[: n_windows * MAX_TRANSCRIPT]
        return [AUDIO_ID] * n_windows * n_vectors + transcript

    return fill


def read_context(system):
    """What stands before the question: a system prompt, or the messages of a .json file."""
    if system.endswith(".json"):
        return read_json(system)
    return [{"role": "system", "content": system}] if system else []


def before_question(messages):
    """The messages before the last question."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    return messages[:last]


def with_context(messages, context):
    """The messages with another context before the last question; None keeps their own."""
    if context is None:
        return messages
    return [*context, *messages[len(before_question(messages)) :]]


# --------------------------------------------------------------------------------------------------
# From files to what the model takes


def audio_windows(path, root, seconds, long_audio="cut", warn=run.warn):
    """An audio file -> waveforms of at most so many seconds: the first ("cut") or all ("split").

    path, root: see engine.rows.audio_file. warn(text) is told of what is cut off.
    """
    file, rest = audio_file(path, root), 0.1  # seconds: a clip of 30.01 s is one of 30 s
    most = seconds + rest if long_audio == "cut" else None
    waveform = load_audio(file, max_seconds=most, warn=warn)
    windows = waveform.split(round(seconds * SAMPLE_RATE))
    if len(windows) > 1 and len(windows[-1]) < round(rest * SAMPLE_RATE):
        windows = windows[:-1]
    if len(windows) > 1 and long_audio == "cut":
        warn(
            f"{file} is longer: only the first {seconds} s are heard (--long_audio split hears all)"
        )
        windows = windows[:1]
    return windows


def transcribe_windows(whisper, clips, seconds):
    """One transcript per clip. clips: list of what audio_windows returns, of `seconds` at most."""
    windows = [window for clip in clips for window in clip]
    limit = min(128, 8 * seconds)  # tokens: nobody speaks faster, but Whisper can loop on noise
    texts = (text.strip() for text in whisper.transcribe(windows, limit, seconds=seconds))
    spoken = [filter(None, [next(texts) for _ in clip]) for clip in clips]  # silence leaves no gap
    return [" ".join(clip) or " " for clip in spoken]


@dataclass
class Reader:
    """From messages and audio files to token ids and log-mels.

    It holds no weights: data-loading processes get a copy.
    """

    tokenizer: Tokenizer
    n_vectors: int  # per window of audio; 0: no Whisper, clips are told in words
    n_mels: int
    audio_seconds: int
    long_audio: str
    fit_window: int = 0

    def mels(self, path, root=None, warn=run.warn):
        """-> log-mels of the file's windows (n_windows, n_mels, frames), on the CPU

        frames: 100 * audio_seconds. With fit_window a clip of one window has only as many whole
        seconds as it lasts: its vectors hang on nothing but the clip, in any batch.
        """
        windows = audio_windows(path, root, self.audio_seconds, self.long_audio, warn)
        seconds = self.audio_seconds
        if self.fit_window and len(windows) == 1:
            seconds = min(seconds, math.ceil(len(windows[0]) / SAMPLE_RATE))
        return log_mel(windows, self.n_mels, seconds=seconds)

    def read(self, messages, root=None, fill=None, warn=run.warn):
        """A conversation -> (token ids of its prompt, log-mels that its AUDIO_IDs stand for)

        fill: see build_prompt; by default in sound.
        """
        in_sound, mels = audio_slot(self.tokenizer, self.n_vectors), []
        fill = fill or (in_sound if self.n_vectors else description_slot(self.tokenizer))

        def fill_and_hear(audio):
            ids = fill(audio)
            if AUDIO_ID not in ids:  # the clip is told in words, or left out: no need to load it
                return ids
            windows = self.mels(audio["audio"], root, warn)
            mels.extend(windows)
            # With --long_audio split the file has told only now how many windows it fills.
            return fill(audio | {"windows": len(windows)})

        return build_prompt(self.tokenizer, messages, fill_and_hear), mels

    def prepare(self, row, root=None, fill=None):
        """A training row -> {"ids", "target", "mels", "warnings"}

        The token ids of prompt and answer, and the log-mels of the clips.
        The target ends with the end-of-turn token, unless the answer was cut ("truncated"): nothing
        teaches a false ending.
        """
        warnings = []
        target = self.tokenizer.encode(row["response"], special=False)
        if not row.get("truncated"):
            target.append(self.tokenizer.eos_id)
        ids, mels = self.read(row["messages"], root, fill, warnings.append)
        return {"ids": ids, "target": target, "mels": mels, "warnings": warnings}


# --------------------------------------------------------------------------------------------------
# The model


@dataclass
class DeSTAConfig:
    """An adapter's config.json: its size, how it was trained, and how it wants to be asked."""

    llm: str = ""  # folders of the frozen parts
    whisper: str = ""
    n_layers: int = 6
    n_queries: int = 64
    n_taps: int = 4  # the last so many of Whisper's four
    lora_rank: int = 0  # see llama.add_lora; 0 leaves the LLM as it is
    train_llm: int = 0  # 1: all weights of the LLM learn; the adapter's file holds them, too
    audio_seconds: int = 30  # clips are padded or cut to this window
    # The rest of longer clips is lost ("cut", as in the paper), or the slot holds the vectors of
    # all windows, one after the other ("split").
    long_audio: str = "cut"
    fit_window: int = 0  # 1: a short clip's window is as long as the clip; official: 0
    context: list | None = None  # messages before the question; None: not known
    max_answer_tokens: int = -1  # of the longest targets; -1: not known

    OFFICIAL_NAMES = {
        "llm": "llm_model_id",
        "whisper": "encoder_model_id",
        "n_layers": "qformer_num_hidden_layers",
        "n_queries": "prompt_size",
    }

    @classmethod
    def from_adapter(cls, folder):
        """Read config.json of an adapter's folder, ours or the released one."""
        file = Path(folder) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: {NO_ADAPTER}")
        saved = read_record(file)
        if saved.get("use_lora") and "lora_rank" not in saved:
            saved["lora_rank"] = 16  # the official code knows no other
        names = {f.name: cls.OFFICIAL_NAMES.get(f.name, f.name) for f in fields(cls)}
        return cls(**{ours: saved[theirs] for ours, theirs in names.items() if theirs in saved})

    def write(self, folder):
        ours = {self.OFFICIAL_NAMES.get(name, name): value for name, value in asdict(self).items()}
        official = {
            "connector_mode": "qformer_1",
            "audio_locator": AUDIO,
            "placeholder_token": "<|reserved_special_token_87|>",  # what the official code writes
            "use_lora": bool(self.lora_rank),
        }
        write_record(Path(folder) / "config.json", official | ours)


class DeSTA(torch.nn.Module):
    """Whisper + adapter + LLM. Only `self.adapter` is trained, unless the paper's comparisons are
    asked for: LoRA, or the whole LLM.
    """

    def __init__(self, config, llm, tokenizer, whisper, adapter):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.llm, self.whisper, self.adapter = llm, whisper, adapter
        llm.requires_grad_(bool(config.train_llm))
        if config.lora_rank:
            add_lora(llm, config.lora_rank, adapter.config.dropout)
        self.taps = tap_layers(whisper.config.encoder_layers)[-config.n_taps :] if whisper else None
        n_vectors, n_mels = (adapter.n_vectors, whisper.config.num_mel_bins) if whisper else (0, 0)
        window = config.audio_seconds, config.long_audio, config.fit_window
        self.reader = Reader(tokenizer, n_vectors, n_mels, *window)
        self.prefix = None, None  # see engine.fast.kept_prefix
        self.warn = run.warn  # is told of clips that are cut or damaged

    @classmethod
    def from_pretrained(
        cls,
        llm,
        whisper,
        adapter=None,
        dtype=None,
        device=None,
        audio_dtype=None,
        shard_llm=False,
        dropout=0.1,
        **config,
    ):
        """Load the frozen parts from Hugging Face folders, and the adapter, if given, from its own.

        dtype: of the LLM, by default compute_dtype(device). audio_dtype: what Whisper and the
        adapter compute in, by default the same; the released model is run with float32.
        config: fields of DeSTAConfig in place of the adapter's own, or of a fresh Q-Former.
        shard_llm: see engine.weights.shard_blocks.
        whisper None: the LLM alone, which reads descriptions in the audio slots.
        """
        device = device or default_device()
        dtype = dtype or compute_dtype(device)
        c = DeSTAConfig() if adapter is None else DeSTAConfig.from_adapter(adapter)
        c = replace(c, **{"llm": str(llm), "whisper": str(whisper or "")} | config)
        tokenizer = Tokenizer(llm)
        if whisper is None:
            return cls(c, Llama.from_pretrained(llm, dtype, device), tokenizer, None, None).eval()
        ears = Whisper.from_pretrained(whisper, audio_dtype or dtype, device)
        llm_model = Llama.from_pretrained(llm, dtype, device, shard=shard_llm)
        w, d_llm = ears.config, llm_model.config.d_model
        size = dict(n_layers=c.n_layers, n_queries=c.n_queries, n_taps=c.n_taps, dropout=dropout)
        qformer = QFormer(QFormerConfig(w.d_model, w.encoder_attention_heads, d_llm, **size))
        model = cls(c, llm_model, tokenizer, ears, qformer.to(device))
        if adapter is not None:
            model.load_adapter(adapter)
        return model.eval()

    @property
    def device(self):
        return self.llm.model.embed_tokens.weight.device

    def trained(self):
        """{name: parameter} of all that learns.

        The LLM's names are the official files', LoRA's too; the adapter's lack ADAPTER_PREFIX.
        """
        llm = self.llm.named_parameters()
        learned = {LLM_PREFIX + name: p for name, p in llm if p.requires_grad}
        return dict(self.adapter.named_parameters()) | learned

    # -- from ids and mels to what the LLM reads ---------------------------------------------------

    def audio_vectors(self, mels):
        """mels: A of (n_mels, frames) -> what the LLM reads for each window (A, n_vectors, d_llm)

        Windows of one length are computed together, so that none is padded to another's.
        """
        lengths = [mel.shape[-1] for mel in mels]
        order, vectors = [], []
        for length in sorted(set(lengths)):
            same = [i for i, n in enumerate(lengths) if n == length]
            # One by one: those in pinned memory are copied while the GPU computes.
            batch = torch.stack([mels[i].to(self.device, non_blocking=True) for i in same])
            taps = self.whisper.encode(batch, self.taps)  # (len(same), n_taps, T, d_model)
            order, vectors = order + same, [*vectors, self.adapter(taps)]
        return torch.cat(vectors)[torch.tensor(order).argsort().to(self.device)]

    def embed(self, ids, mels):
        """What the LLM reads. ids (B, T) on the CPU, AUDIO_ID for each audio vector -> (B, T,
        d_llm)

        mels: list of the windows' log-mels, in the order of the AUDIO_IDs.
        """
        # Counted on the CPU: a GPU would have to finish its work first to say how many there are.
        row, position = (ids == AUDIO_ID).nonzero(as_tuple=True)
        x = self.llm.embed(ids.clamp(min=0).to(self.device))
        if mels:
            vectors = self.audio_vectors(mels).flatten(0, 1)  # (A * n_vectors, d_llm)
            assert len(row) == len(vectors), "audio slots and clips do not match"
            x = x.index_put((row.to(x.device), position.to(x.device)), vectors.to(x.dtype))
        if self.llm.sharded and torch.is_grad_enabled() and not x.requires_grad:
            x.requires_grad_()  # all ranks make the same backward passes, with audio or without
        return x

    # -- training ----------------------------------------------------------------------------------

    def losses(self, rows):
        """Cross-entropy of each target token of prepared rows. -> (n_targets,), row after row

        A row is prompt + target, and position i predicts token i + 1. Rows are padded on the right:
        causal attention never looks there, so there is no mask, and FlashAttention can be used.
        """
        if fast.wanted(self.llm.lm_head.weight):  # on CPUs: the same losses, sooner
            return fast.losses(self, rows)
        sequences = [torch.tensor(row["ids"] + row["target"]) for row in rows]
        ids = pad_sequence(sequences, batch_first=True)  # (B, T)
        # Where the targets are predicted: one before each. Made on the CPU, for a boolean mask
        # would make a GPU wait. row and position: (n_targets,)
        row = torch.cat([torch.full((len(r["target"]),), b) for b, r in enumerate(rows)])
        position = torch.cat([len(r["ids"]) - 1 + torch.arange(len(r["target"])) for r in rows])
        mels = [mel for r in rows for mel in r["mels"]]
        hidden = self.llm.hidden_states(self.embed(ids[:, :-1], mels))  # (B, T - 1, d_llm)
        # The head comes after the selection: it is the largest product, and most positions are
        # prompt.
        hidden = hidden[row.to(self.device), position.to(self.device)]  # (n_targets, d_llm)
        logits = self.llm.lm_head(hidden).float()  # (n_targets, vocab_size)
        return F.cross_entropy(logits, ids[row, position + 1].to(self.device), reduction="none")

    def loss(self, rows, n_target_tokens=None, root=None):
        """Mean cross-entropy of the target tokens of rows -> scalar

        rows: training rows, or what Reader.prepare made of them.
        n_target_tokens: divide by this many instead of the batch's own count. train.py passes the
        count of the *global* batch, so that every token weighs the same however rows are split over
        micro-batches and processes. (The official code averages the means of micro-batches, where a
        token in a short batch weighs more.)
        """
        rows = [row if "ids" in row else self.reader.prepare(row, root) for row in rows]
        losses = self.losses(rows)
        return losses.sum() / (n_target_tokens or len(losses))

    def row_losses(self, rows):
        """Prepared rows -> (summed losses of each row (B,), number of its target tokens (B,))"""
        counts = [len(row["target"]) for row in rows]
        sums = torch.stack([losses.sum() for losses in self.losses(rows).split(counts)])
        return sums, torch.tensor(counts, device=self.device)

    def take_part(self):
        """For a rank without rows: gather a sharded LLM's blocks as often as the others do."""
        weight = self.llm.model.embed_tokens.weight
        x = weight.new_zeros(1, 1, weight.shape[1], requires_grad=torch.is_grad_enabled())
        hidden = self.llm.hidden_states(x)
        if hidden.requires_grad:
            (0 * hidden).sum().backward()  # adds nothing, to LoRA's weights neither

    # -- inference ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self,
        messages,
        max_new_tokens=512,
        temperature=0.0,
        top_p=1.0,
        seed=0,
        root=None,
        fill=None,
        **options,
    ):
        """Answer one conversation, or a list of them -> list of str

        messages: [{"role": "system", "content": "..."},
                   {"role": "user", "content": "<|AUDIO|>\nWho speaks?",
                    "audios": [{"audio": "a.wav", "text": None}]}]
        with any number of turns and audios, none included. "text" is the transcript; None: let
        Whisper write it.
        root: folder that audio paths start from and must stay in; None: any path will do.
        fill: see build_prompt. options: batch_size, progress of engine.decode.generate.
        """
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        conversations = self.with_transcripts(conversations, root)
        prompts = []
        for start in range(0, len(conversations), 16):  # the encoders' batch; the LLM has its own
            part = conversations[start : start + 16]
            rows = [self.reader.read(messages, root, fill, self.warn) for messages in part]
            ids = pad_sequence([torch.tensor(ids) for ids, _ in rows], batch_first=True)
            x = self.embed(ids, [mel for _, mels in rows for mel in mels])  # (rows, T, d_llm)
            prompts += [x[b, : len(ids)] for b, (ids, _) in enumerate(rows)]
        sampling = max_new_tokens, temperature, top_p
        answers = generate(self.llm, prompts, *sampling, self.tokenizer.stop_ids, seed, **options)
        return [self.tokenizer.decode(ids).strip() for ids in answers]

    def with_transcripts(self, conversations, root=None):
        """The same conversations, with missing transcripts ("text": None) written by Whisper."""
        if self.whisper is None:
            return conversations
        c = self.config
        files = [a["audio"] for m in conversations for a in audios_of(m) if a.get("text") is None]
        window = c.audio_seconds, c.long_audio
        silent = lambda text: None  # what is wrong with a file is said when its mels are made
        clips = [audio_windows(file, root, *window, silent) for file in files]
        texts = iter(transcribe_windows(self.whisper, clips, c.audio_seconds))

        def filled(audio):
            return audio | {"text": next(texts)} if audio.get("text") is None else audio

        def with_text(message):
            audios = message.get("audios") or []
            return message | {"audios": [filled(audio) for audio in audios]} if audios else message

        return [[with_text(message) for message in messages] for messages in conversations]

    # -- the adapter's folder: model.safetensors under the official names, and config.json --------

    def save_adapter(self, folder):
        """Write what was trained, and config.json. A kill leaves the old adapter or the new one."""
        adapter = self.adapter.state_to_save()
        state = {ADAPTER_PREFIX + name: tensor for name, tensor in adapter.items()}
        state |= {name: p for name, p in self.trained().items() if name.startswith(LLM_PREFIX)}
        save_tensors(Path(folder) / "model.safetensors", state)
        self.config.write(folder)

    def load_adapter(self, folder):
        """Load model.safetensors of an adapter folder, ours or the released one.

        Errors: FileNotFoundError; ValueError that lists missing, unknown or misshapen tensors.
        """
        file = Path(folder) / "model.safetensors"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: {NO_ADAPTER}")
        try:
            loaded = load_tensors(file)
        except ValueError as error:
            remedy = "use an older one, OUT/checkpoints/*/adapter of train.py, or train again"
            raise ValueError(f"{error}: {remedy}") from None
        loaded = {name.removeprefix(ADAPTER_PREFIX): t.float() for name, t in loaded.items()}
        trained = self.trained()
        saved = DeSTAConfig.from_adapter(folder)
        if not (saved.lora_rank or saved.train_llm):  # what learns in the LLM starts from here
            trained = dict(self.adapter.named_parameters())
        shapes = lambda tensors: {name: tensor.shape for name, tensor in tensors.items()}
        check_fit(f"{file} does not fit this Whisper and LLM", shapes(loaded), shapes(trained))
        for name, parameter in trained.items():
            parameter.data.copy_(loaded[name])


# --------------------------------------------------------------------------------------------------
# Ask about a file


@dataclass
class Settings:
    audio: str = argument("the clip: wav, flac, ogg, opus, mp3, …")
    prompt: str = setting("", "one question; without it, a conversation in the terminal")
    adapter: str = setting("out/demo/adapter", "folder written by train.py, or the released one")
    llm: str = setting("", "Hugging Face folder; '' is the one that the adapter was trained with")
    whisper: str = setting("", "Hugging Face folder; '' as above")
    system: str = setting("", "system prompt, or a .json file of messages; '' is as trained")
    precision: str = setting("fast", "official: Whisper and adapter in float32", choices=PRECISION)
    long_audio: str = setting(
        "", "beyond the window: cut, split; '' is as trained", choices=("", *LONG)
    )
    max_new_tokens: int = setting(-1, "the answer is cut here; -1 is as trained", low=1)
    temperature: float = setting(0.0, "0 is greedy", high=100)
    top_p: float = setting(1.0, "nucleus sampling, where temperature is not 0", low=1e-6, high=1)
    verbose: int = setting(0, "1: show transcripts and the prompt", high=1)
    textbook: int = setting(0, "1: compute as GPUs do, on CPUs too: slower", high=1)


def inherit(settings, adapter, names):
    """Settings that no flag gave become the adapter's instead of the recipe's.

    ValueError where a flag contradicts its size.
    """
    saved, size = asdict(DeSTAConfig.from_adapter(adapter)), ("n_layers", "n_queries", "n_taps")
    for name in names:
        given, value = name in settings.given, saved[name]
        if given and name in size and getattr(settings, name) != value:
            raise ValueError(f"--{name} {getattr(settings, name)}: {adapter} has {value}")
        if not given and value not in ("", None, -1):
            setattr(settings, name, value)


def load_to_ask(s, device=None):
    """The adapter s.adapter, on the LLM and the Whisper it was trained with, or on s.llm,
    s.whisper.

    s: a script's settings; s.precision and s.long_audio are used, too.
    """
    saved = DeSTAConfig.from_adapter(s.adapter)
    llm, whisper = s.llm or saved.llm, s.whisper or saved.whisper
    for flag, folder in (("llm", llm), ("whisper", whisper)):
        if not getattr(s, flag) and not Path(folder).is_dir():
            problem = f"{s.adapter} was trained with {folder}, which is no folder here"
            raise FileNotFoundError(f"{problem}: give --{flag}")
    audio_dtype = torch.float32 if s.precision == "official" else None
    changes = {"long_audio": s.long_audio} if s.long_audio else {}
    options = dict(device=device, audio_dtype=audio_dtype, **changes)
    return DeSTA.from_pretrained(llm, whisper, s.adapter, **options)


def main():
    s = run.parse_settings(Settings, __doc__)
    fast.textbook = bool(s.textbook)
    load_audio(audio_file(s.audio), max_seconds=1)  # a wrong path should not cost loading weights
    model = load_to_ask(s)
    context, limit = model.config.context, model.config.max_answer_tokens
    if s.system or context is None:
        context = read_context(s.system or GENERATE_DATA["system"]["paper"])
    limit = next(n for n in (s.max_new_tokens, limit, 512) if n > 0)

    def ask(messages):
        """-> the conversation with its transcripts and the model's answer"""
        messages = model.with_transcripts([messages])[0]
        if s.verbose:
            for audio in audios_of(messages):
                print(f"transcript of {audio['audio']}: {audio['text']!r}")
            in_words = [{"role": m["role"], "content": m["content"]} for m in messages]
            print(model.tokenizer.apply_chat_template(in_words))
        answer = model.generate(messages, limit, s.temperature, s.top_p)[0]
        print(answer)
        return [*messages, {"role": "assistant", "content": answer}]

    new_clips = [s.audio]
    turn = lambda text: {
        "role": "user",
        "content": AUDIO * len(new_clips) + "\n\n" * bool(new_clips) + text,
        "audios": [{"audio": clip, "text": None} for clip in new_clips],
    }
    if s.prompt:
        ask([*context, turn(s.prompt)])
        return
    print(f"Ask about {s.audio}. /audio FILE adds a clip, Ctrl-D ends.")
    messages = context
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        try:
            if text.startswith("/audio "):
                file = text.removeprefix("/audio ").strip()
                load_audio(audio_file(file), max_seconds=1)
                new_clips.append(file)
                print(f"added {file}: it stands before the next question")
            elif text.startswith("/"):
                print("/audio FILE adds a clip, Ctrl-D ends; all else is a question")
            elif text:
                messages = ask([*messages, turn(text.replace(AUDIO, ""))])
                new_clips = []
        except (OSError, ValueError) as error:  # a wrong path does not end the conversation
            print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    run.main(main)
