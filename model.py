"""
model.py: DeSTA2.5-Audio, the three parts joined (paper sections 3 and 4).

    audio -> Whisper encoder (frozen) -> four taps -> Q-Former (trained) -> 64 vectors + transcript -> LLM (frozen) -> text

The heart is `build_prompt`: one chat prompt with one slot. Filled with a text description of the clip, the LLM writes the
training targets. Filled with the audio vectors and the transcript, the same LLM has to give the same answers.

    python model.py clip.wav --prompt "What do you hear?" --adapter out/demo/adapter
    python model.py clip.wav --prompt "Who speaks?" --llm Llama-3.1-8B-Instruct --whisper whisper-large-v3 --adapter DIR
"""

import argparse
import functools
import itertools
import os
import re
import sys
from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F

from common import load_tensors, read_record, run, save_tensors, write_record
from llama import Llama, Prefix, add_lora, attend, causal_bias, generate
from qformer import QFormer, QFormerConfig
from tokenizer import Tokenizer, read_json
from whisper import SAMPLE_RATE, Whisper, load_audio, log_mel, tap_layers

AUDIO, START, END = "<|AUDIO|>", "<start_audio>", "<end_audio>"
AUDIO_ID = -1  # stands for one audio vector in a list of token ids; never reaches the embedding table
MAX_TRANSCRIPT = 100  # tokens per window
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff")
ADAPTER_PREFIX, LLM_PREFIX = "perception.connector.", "llm_model."  # the official checkpoint's names of the Q-Former and of the LLM
NO_ADAPTER = "train an adapter with `torchrun train.py`, or download the released one"


# ----------------------------------------------------------------------------------------------------------------------
# The prompt


def audios_of(messages):
    """All audios of a conversation, in order. ValueError where the number of <|AUDIO|> and of audios differ."""
    audios = []
    for i, message in enumerate(messages):
        n_slots, given = message["content"].count(AUDIO), message.get("audios") or []
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError(f"message {i}: the role is {message['role']!r}, not system, user or assistant")
        if n_slots != len(given):
            raise ValueError(f"message {i} ({message['role']}) has {n_slots} {AUDIO} but {len(given)} audios")
        audios += given
    return audios


def build_prompt(tokenizer, messages, fill):
    """THE HEART OF THE METHOD: one chat prompt, whose audio slots can be filled in two ways.

    messages: the official form (see DeSTA.generate). fill: audio dict -> list of token ids, one of
        description_slot(tokenizer)          the clip in words: what the LLM reads when it writes the training target
        audio_slot(tokenizer, n_queries)     AUDIO_ID for each audio vector, then the transcript: what it must match
        lambda audio: []                     nothing: how much can be guessed without the clip
    -> token ids. Everything outside the slots is the same, token for token, whatever fills them: the text before
    and after a slot is tokenized on its own.
    """
    audios = audios_of(messages)
    # Training files carry the delimiters, hand-written prompts a bare <|AUDIO|>: both become the same text.
    delimited = lambda text: re.sub(f"(?:{START})?{re.escape(AUDIO)}(?:{END})?", START + AUDIO + END, text)
    chat = [{"role": m["role"], "content": delimited(m["content"])} for m in messages]
    before, *after = tokenizer.apply_chat_template(chat).split(AUDIO)
    ids = tokenizer.encode(before)
    for audio, text in zip(audios, after, strict=True):
        ids += fill(audio) + tokenizer.encode(text)
    return ids


def opening(system):
    """What stands before the question: a system prompt, or the messages of a .json file (for a small LLM: worked examples too)."""
    if system.endswith(".json"):
        return read_json(Path(system))
    return [{"role": "system", "content": system}] if system else []


def description_slot(tokenizer):
    return lambda audio: tokenizer.encode(audio["description"], special=False)


def audio_slot(tokenizer, n_queries):
    def fill(audio):
        if not isinstance(audio.get("text"), str):
            raise ValueError(f"{audio.get('audio')} has no transcript: give \"text\" (generate_data.py writes it; DeSTA.generate lets Whisper)")
        n = audio.get("windows", 1)  # of a long clip, with --long_audio split: the vectors of the first, of the second, …, then the transcript
        # special=False: "<|im_end|>" in a transcript is something that was said, not the end of a turn.
        return [AUDIO_ID] * n * n_queries + tokenizer.encode(audio["text"], special=False)[: n * MAX_TRANSCRIPT]

    return fill


# ----------------------------------------------------------------------------------------------------------------------
# Audio files


def audio_file(path, root=None):
    """root/path, or where nothing is there, the one file that differs from it in its extension: data sets say .flac of what is .wav on disk.

    root: the folder that the path starts from and must stay in (ValueError), for it comes out of a data file; None: any path will do.
    """
    file = Path(root or ".") / path
    if root is not None and not Path(os.path.abspath(file)).is_relative_to(os.path.abspath(root)):
        raise ValueError(f"{path} lies outside the audio root {root}: give a root that holds it (/ holds all absolute paths)")
    if file.exists() or not file.name:
        return file
    others = [other for suffix in SUFFIXES if (other := file.with_suffix(suffix)).exists()]
    return others[0] if len(others) == 1 else file


@functools.cache
def warn_once(text):
    print(f"warning: {text}", file=sys.stderr)


def audio_windows(path, root, seconds, long_audio="cut"):
    """An audio file -> its waveforms of at most so many seconds, in order: all of them ("split"), or the first, with a warning ("cut")."""
    file, rest = audio_file(path, root), 0.1  # seconds: a clip of 30.01 s is one of 30 s
    windows = load_audio(file, max_seconds=seconds + rest if long_audio == "cut" else None).split(round(seconds * SAMPLE_RATE))
    if len(windows) > 1 and len(windows[-1]) < round(rest * SAMPLE_RATE):
        windows = windows[:-1]
    if len(windows) > 1 and long_audio == "cut":
        total = soundfile.info(file).duration
        warn_once(f"{file} lasts {total:.1f} s: the last {total - seconds:.1f} s are not heard (--long_audio split hears them)")
        windows = windows[:1]
    return windows


def transcribe_windows(whisper, clips, seconds, max_new_tokens=128):
    """One transcript per clip. clips: list of what audio_windows returns."""
    texts = iter(whisper.transcribe([window for clip in clips for window in clip], max_new_tokens, seconds=seconds))
    return [" ".join(text for text in [next(texts) for _ in clip] if text.strip()) or " " for clip in clips]


# ----------------------------------------------------------------------------------------------------------------------
# Rows of a batch inside the LLM


class Packed:
    """Rows of these lengths laid end to end, (1, sum of lengths, …), each continuing the prefix: no padding is computed anywhere."""

    def __init__(self, lengths, prefix, dtype, device):
        self.lengths, self.prefix = lengths, prefix
        self.biases = [causal_bias(torch.arange(n, device=device)[None], n, dtype) if prefix else None for n in lengths]

    def attend(self, layer, q, k, v):
        rows = zip(*(t.split(self.lengths, dim=2) for t in (q, k, v)), self.biases)
        prefix = self.prefix[layer] if self.prefix else None
        return torch.cat([attend(*row, prefix) for row in rows], dim=2)


# ----------------------------------------------------------------------------------------------------------------------
# The model


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype(device):
    """bf16 where the hardware multiplies it (every recent GPU; CPUs with AVX512-BF16 or AMX: 4x float32), else float32."""
    if torch.device(device).type == "cpu":
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.bfloat16


class DeSTA(torch.nn.Module):
    """Whisper + Q-Former + LLM. Only `self.qformer` has trainable parameters, and LoRA's matrices in the LLM, where they are asked for.

    llm_folder and whisper_folder name the frozen parts in the adapter's config.json.
    audio_seconds: clips are padded or cut to this. 30 in the paper; the demo's short clips take less.
    long_audio: what becomes of the rest of longer ones. "cut": it is lost, as in the paper. "split": the slot holds the vectors of
    all windows of audio_seconds, one after the other. lora_rank: see llama.add_lora; 0 leaves the LLM as it is.
    """

    def __init__(self, llm, tokenizer, whisper, qformer, audio_seconds=30, llm_folder="", whisper_folder="", long_audio="cut", lora_rank=0):
        super().__init__()
        if long_audio not in ("cut", "split"):
            raise ValueError(f"long_audio {long_audio!r} is neither cut nor split")
        self.long_audio, self.lora_rank = long_audio, lora_rank
        if lora_rank:
            add_lora(llm, lora_rank, qformer.config.dropout)
        self.llm, self.tokenizer, self.whisper, self.qformer = llm, tokenizer, whisper, qformer
        self.audio_seconds, self.llm_folder, self.whisper_folder = audio_seconds, str(llm_folder), str(whisper_folder)
        self.taps = tap_layers(whisper.config.encoder_layers) if whisper else None
        self.kept_prefix = None, None  # see frozen_prefix

    @classmethod
    def from_pretrained(
        cls, llm, whisper, adapter=None, dtype=None, device=None, audio_dtype=None, audio_seconds=30, long_audio="", lora_rank=0,
        shard_llm=False, **qformer,
    ):  # fmt: skip
        """Load the frozen parts from Hugging Face folders, and the adapter from its folder, if given.

        dtype: of the LLM, by default compute_dtype(device). audio_dtype: what Whisper and the Q-Former compute in, by
        default the same; the released model is run with float32. long_audio: see the class; by default as the adapter was
        trained. shard_llm: see llama.shard_blocks. Without an adapter a fresh Q-Former is made, for which audio_seconds,
        lora_rank and the fields n_layers, n_queries, dropout of QFormerConfig can be given. whisper None: the LLM alone,
        which reads descriptions in the audio slots.
        """
        device = device or default_device()
        dtype = dtype or compute_dtype(device)
        if adapter is not None:
            if not (Path(adapter) / "config.json").is_file():
                raise FileNotFoundError(f"{adapter}/config.json is missing: {NO_ADAPTER}")
            saved = read_record(Path(adapter) / "config.json")
            qformer |= {"n_layers": saved["qformer_num_hidden_layers"], "n_queries": saved["prompt_size"]}
            audio_seconds, long_audio = saved.get("audio_seconds", 30), long_audio or saved.get("long_audio", "")
            lora_rank = saved.get("lora_rank", 16 * bool(saved.get("use_lora")))  # the official code knows no other rank
        tokenizer = Tokenizer(llm)
        if whisper is None:
            return cls(Llama.from_pretrained(llm, dtype=dtype, device=device), tokenizer, None, None, llm_folder=llm).eval()
        whisper_model = Whisper.from_pretrained(whisper, dtype=audio_dtype or dtype, device=device)
        llm_model = Llama.from_pretrained(llm, dtype=dtype, device=device, shard=shard_llm)
        w = whisper_model.config
        n_taps = len(tap_layers(w.encoder_layers))
        config = QFormerConfig(w.d_model, w.encoder_attention_heads, llm_model.config.d_model, n_taps=n_taps, **qformer)
        adapter_module = QFormer(config).to(device)
        model = cls(llm_model, tokenizer, whisper_model, adapter_module, audio_seconds, llm, whisper, long_audio or "cut", lora_rank)
        if adapter is not None:
            model.load_adapter(adapter)
        return model.eval()

    @property
    def device(self):
        return self.llm.model.embed_tokens.weight.device

    def trained(self):
        """{name: parameter} of all that learns. LoRA's names are the official files'; the Q-Former's lack ADAPTER_PREFIX."""
        lora = {f"{LLM_PREFIX}{name}": p for name, p in self.llm.named_parameters() if ".lora_" in name}
        return dict(self.qformer.named_parameters()) | lora

    # -- audio in ------------------------------------------------------------------------------------------------------

    def mels(self, path, root=None):
        """Audio file -> log-mels of its windows (n_windows, n_mels, 100 * audio_seconds) on the CPU; safe to call in data-loading workers."""
        windows = audio_windows(path, root, self.audio_seconds, self.long_audio)
        return log_mel(windows, self.whisper.config.num_mel_bins, seconds=self.audio_seconds)

    def read(self, messages, root=None, fill=None):
        """A conversation -> (token ids of its prompt, list of the log-mels that its AUDIO_IDs stand for). fill: see build_prompt."""
        fill = fill or (audio_slot(self.tokenizer, self.qformer.config.n_queries) if self.qformer else description_slot(self.tokenizer))
        mels = []

        def fill_and_hear(audio):
            ids = fill(audio)
            if AUDIO_ID in ids:  # else the clip is told in words, or left out: no need to load it
                windows = self.mels(audio["audio"], root)
                mels.extend(windows)
                ids = fill(audio | {"windows": len(windows)}) if len(windows) > 1 else ids
            return ids

        return build_prompt(self.tokenizer, messages, fill_and_hear), mels

    def audio_vectors(self, mels):
        """mels (A, n_mels, frames) -> what the LLM reads in place of each clip: (A, n_queries, d_llm)."""
        taps = self.whisper.encode(mels.to(self.device), self.taps)  # (A, n_taps, T, d_model), without gradient
        return self.qformer(taps)

    def embed(self, ids, mels):
        """Token ids with AUDIO_ID in them (B, T), and the mels of their audios in reading order -> (B, T, d_llm)."""
        x = self.llm.embed(ids.clamp(min=0))
        if len(mels):
            vectors = self.audio_vectors(mels)
            assert (ids == AUDIO_ID).sum() == vectors.shape[0] * vectors.shape[1], "audio slots and clips do not match"
            x = x.index_put((ids == AUDIO_ID,), vectors.flatten(0, 1).to(x.dtype))
        return x

    # -- training ------------------------------------------------------------------------------------------------------

    def prepare(self, row, root=None, fill=None):
        """A training row -> {"ids", "target", "mels"}: tokens of the prompt and of the answer, and the clips' log-mels.

        fill: what goes into the slot (see build_prompt), by default the audio. Runs on the CPU, in any worker process.
        """
        target = self.tokenizer.encode(row["response"], special=False) + [self.tokenizer.eos_id]
        ids, mels = self.read(row["messages"], root, fill)
        return {"ids": ids, "target": target, "mels": mels}

    @torch.no_grad()
    def frozen_prefix(self, ids):
        """Keys and values of token ids that stand before any audio. The last result is kept: a data set's rows mostly start alike."""
        if ids and self.kept_prefix[0] != ids:
            prefix = Prefix()
            self.llm.hidden_states(self.llm.embed(torch.tensor([ids], device=self.device)), prefix)
            self.kept_prefix = ids, prefix
        return self.kept_prefix[1] if ids else None

    def row_losses(self, rows):
        """Prepared rows -> (summed cross-entropy of each row's target (B,), number of its tokens (B,))."""
        # What all rows start with (template header, system prompt, examples) does not depend on trained weights.
        # (With LoRA it does; and with a sharded LLM every rank must make the same number of passes.)
        P, shortest = 0, min(len(row["ids"]) for row in rows)
        may_share = not (self.lora_rank or self.llm.sharded)
        while may_share and len({row["ids"][P] for row in rows}) == 1 and rows[0]["ids"][P] != AUDIO_ID and P < shortest - 1:
            P += 1
        prefix = self.frozen_prefix(rows[0]["ids"][:P])
        # Rows go on with prompt + target without its last token, one after the other.
        sequences = [torch.tensor(row["ids"][P:] + row["target"][:-1]) for row in rows]
        lengths = [len(sequence) for sequence in sequences]
        ids = torch.cat(sequences)[None].to(self.device)  # (1, T), T the sum of lengths
        positions = torch.cat([P + torch.arange(n) for n in lengths])[None].to(self.device)
        mels = [mel for row in rows for mel in row["mels"]]
        x = self.embed(ids, torch.stack(mels) if mels else mels)
        if self.llm.sharded and torch.is_grad_enabled():
            x.requires_grad_()  # rows without audio too: the backward pass is one of those that every rank must make
        hidden = self.llm.hidden_states(x, Packed(lengths, prefix, x.dtype, x.device), positions)[0]  # (T, d_llm)
        # Position len(prompt) - 1 + j predicts target token j. Pick these *before* the output head: its
        # vocabulary-sized product is the largest in the model, and most positions are prompt.
        n_targets = [len(row["target"]) for row in rows]
        position = torch.cat([end - n + torch.arange(n) for end, n in zip(itertools.accumulate(lengths), n_targets)]).to(self.device)
        row_index = torch.arange(len(rows)).repeat_interleave(torch.tensor(n_targets)).to(self.device)
        targets = torch.cat([torch.tensor(row["target"]) for row in rows]).to(self.device)
        logits = self.llm.lm_head(hidden[position]).float()  # (target tokens of the batch, vocab_size)
        losses = F.cross_entropy(logits, targets, reduction="none")
        counts = torch.bincount(row_index, minlength=len(rows))
        return torch.zeros(len(rows), device=self.device).index_add(0, row_index, losses), counts

    def take_part(self):
        """What a rank without rows does while others compute theirs with a sharded LLM: gather and pass on all blocks as often as they do."""
        weight = self.llm.model.embed_tokens.weight
        x = weight.new_zeros(1, 1, weight.shape[1], requires_grad=torch.is_grad_enabled())
        hidden = self.llm.hidden_states(x)
        if hidden.requires_grad:
            hidden.sum().backward()

    def loss(self, rows, n_target_tokens=None, root=None):
        """Mean cross-entropy of the target tokens of rows (training rows, or what `prepare` made of them) -> scalar.

        n_target_tokens: divide by this many instead of the batch's own count. train.py passes the count of the *global*
        batch, so that every token weighs the same however rows are split over micro-batches and processes. (The official
        code averages the means of micro-batches, where a token in a short batch weighs more.)
        """
        rows = [row if "ids" in row else self.prepare(row, root) for row in rows]
        sums, counts = self.row_losses(rows)
        return sums.sum() / (n_target_tokens or counts.sum())

    # -- inference -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(self, messages, max_new_tokens=512, temperature=0.0, top_p=1.0, seed=0, root=None, fill=None, **options):
        """Answer one conversation, or a list of them -> list of str.

        messages: [{"role": "system", "content": "..."},
                   {"role": "user", "content": "<|AUDIO|>\nWho speaks?", "audios": [{"audio": "a.wav", "text": None}]}]
        with any number of turns and audios, none included. "text" is the transcript; None: let Whisper write it.
        root: folder that audio paths start from and must stay in; None: any path will do.
        fill: see build_prompt. options: batch_size, progress of llama.generate.
        """
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        conversations = self._with_transcripts(conversations, root)
        prompts = []
        for start in range(0, len(conversations), 16):  # encoders run on 16 conversations at once, the LLM on options["batch_size"]
            ids, mels = zip(*(self.read(conversation, root, fill) for conversation in conversations[start : start + 16]))
            rows, mels = [torch.tensor(i) for i in ids], [mel for m in mels for mel in m]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
            x = self.embed(ids, torch.stack(mels) if mels else mels)  # (rows, T, d_llm)
            prompts += [x[b, : len(ids)] for b, ids in enumerate(rows)]
        stop_ids = self.tokenizer.stop_ids
        answers = generate(self.llm, prompts, max_new_tokens, temperature, top_p, stop_ids, seed, **options)
        return [self.tokenizer.decode(ids).strip() for ids in answers]

    def _with_transcripts(self, conversations, root):
        """The same conversations, with every missing ("text": None) transcript written by Whisper, all in one batch."""
        if self.whisper is None:
            return conversations
        files = [a["audio"] for c in conversations for a in audios_of(c) if a.get("text") is None]
        clips = [audio_windows(file, root, self.audio_seconds, self.long_audio) for file in files]
        texts = iter(transcribe_windows(self.whisper, clips, self.audio_seconds))
        fill_in = lambda audio: audio if audio.get("text") is not None else audio | {"text": next(texts)}
        return [
            [m | {"audios": [fill_in(a) for a in m["audios"]]} if m.get("audios") else m for m in conversation]
            for conversation in conversations
        ]

    # -- the adapter's folder: model.safetensors under the official names, and config.json -------------------------------

    def save_adapter(self, folder):
        """Write the trained part only, atomically: a killed process leaves the old adapter or the new one."""
        folder = Path(folder)
        config = {
            "llm_model_id": self.llm_folder,
            "encoder_model_id": self.whisper_folder,
            "connector_mode": "qformer_1",
            "qformer_num_hidden_layers": self.qformer.config.n_layers,
            "prompt_size": self.qformer.config.n_queries,
            "audio_locator": AUDIO,
            "placeholder_token": "<|reserved_special_token_87|>",  # what the official code writes; ours needs none
            "audio_seconds": self.audio_seconds,  # this and what follows is ours
            "long_audio": self.long_audio,
            "use_lora": bool(self.lora_rank),  # official again
            "lora_rank": self.lora_rank,
        }
        state = {ADAPTER_PREFIX + name: tensor for name, tensor in self.qformer.official_state_dict().items()}
        state |= {name: p.detach() for name, p in self.trained().items() if name.startswith(LLM_PREFIX)}
        save_tensors(folder / "model.safetensors", state)
        write_record(folder / "config.json", config)

    def load_adapter(self, folder):
        """Load model.safetensors of an adapter folder, ours or the released one.

        Errors: FileNotFoundError; ValueError that lists missing, unknown or misshapen tensors.
        """
        file = Path(folder) / "model.safetensors"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: {NO_ADAPTER}")
        try:
            loaded = {name.removeprefix(ADAPTER_PREFIX): t.float() for name, t in load_tensors(file).items()}
        except ValueError as error:
            raise ValueError(f"{error}: use an older one, OUT/checkpoints/*/adapter of train.py, or train again") from None
        wanted = {name: parameter.shape for name, parameter in self.trained().items()}
        wrong = [f"{n} {tuple(t.shape)}, expected {tuple(wanted[n])}" for n, t in loaded.items() if n in wanted and t.shape != wanted[n]]
        problems = {"missing": sorted(wanted.keys() - loaded), "unknown": sorted(loaded.keys() - wanted), "wrong shape": wrong}
        if any(problems.values()):
            lists = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
            raise ValueError(f"{file} does not fit this Whisper and LLM. {lists}")
        for name, parameter in self.trained().items():
            parameter.data.copy_(loaded[name])


# ----------------------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description="Ask about one audio file.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("audio", help="wav, flac, ogg or mp3")
    parser.add_argument("--prompt", default="What do you hear?")
    parser.add_argument("--system", default="demo/context.json", help="system prompt, or a .json file of messages: what the adapter was trained with")
    parser.add_argument("--llm", default="weights/smollm2-135m-instruct", help="Hugging Face folder")
    parser.add_argument("--whisper", default="weights/whisper-tiny.en", help="Hugging Face folder")
    parser.add_argument("--adapter", default="out/demo/adapter", help="folder written by train.py, or the released one")
    parser.add_argument("--precision", choices=("fast", "official"), default="fast", help="official: Whisper and Q-Former in float32")
    parser.add_argument("--long_audio", choices=("cut", "split"), help="beyond the adapter's window: lost, or heard too (default: as trained)")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=1.0)
    args = parser.parse_args()
    load_audio(audio_file(args.audio), max_seconds=1)  # a wrong path should not cost the loading of the weights
    audio_dtype = torch.float32 if args.precision == "official" else None
    model = DeSTA.from_pretrained(args.llm, args.whisper, args.adapter, audio_dtype=audio_dtype, long_audio=args.long_audio)
    audio = {"audio": args.audio, "text": None}
    question = {"role": "user", "content": f"{AUDIO}\n\n{args.prompt}", "audios": [audio]}
    print(model.generate([*opening(args.system), question], args.max_new_tokens, args.temperature, args.top_p)[0])


if __name__ == "__main__":
    run(main)
