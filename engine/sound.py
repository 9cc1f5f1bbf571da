"""
sound.py: the samples of a sound file as it is found: of any format and rate, cut off, damaged.

libsndfile does the decoding. Two kinds of files need more than one call:
- PCM and FLAC promise a length. A file that holds less was cut off: at least half of it is used,
  with a warning, and less is refused.
- The length of MPEG layers (mp3, or in a wav file), Vorbis and Opus is an estimate. What can be
  decoded is the clip; an error in the middle is a warning.
"""

import contextlib
import io
import os
import re
import shlex
from pathlib import Path

import numpy as np
import soundfile

from engine import run

ESTIMATED = ("MPEG", "VORBIS", "OPUS")
MPEG_FRAME = 1441  # bytes, at most


def read_sound(path, max_seconds=None, warn=run.warn):
    """Decode a file, or its first max_seconds. -> samples float32 (n, channels), samples a second

    warn(text) is called when less than the whole file can be read.
    Errors: FileNotFoundError or ValueError, in one line that names the file and the remedy.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory: give the path of one audio file")
    if not (path.is_file() and os.access(path, os.R_OK)):
        remedy = "check the path, and the audio root if it is relative to one"
        raise FileNotFoundError(f"{path}: no such readable file; {remedy}")
    remedy = f"fetch it again, or rewrite it with `ffmpeg -i {shlex.quote(str(path))} new.wav`"
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes): {remedy}")
    try:
        with open_sound(path) as file:
            rate, promised = file.samplerate, promised_frames(file)
            if file.format == "RAW":  # how libsndfile opens any .au, .vox or .gsm without a header
                raise ValueError(f"{path} cannot be decoded (no known header): {remedy}")
            if not 1000 <= rate <= 1_000_000:
                raise ValueError(f"{path} claims {rate} samples a second: {remedy}")
            n_frames = file.frames if max_seconds is None else round(max_seconds * rate)
            samples, error = decode(file, n_frames)
        if error and file.subtype.startswith("MPEG"):
            # libsndfile throws away what it decoded in a call that ends in an error: so once more,
            # half an MPEG frame a call.
            with open_sound(path, n_zeros=MPEG_FRAME) as file:
                samples, error = decode(file, n_frames, frames_at_once=576)
    # TypeError: the name ends in .raw, which says nothing of what is inside
    except (soundfile.LibsndfileError, TypeError, OSError) as caught:
        raise ValueError(f"{path} cannot be decoded ({reason(caught)}): {remedy}") from None

    if len(samples) == 0:
        problem = f"cannot be decoded ({reason(error)})" if error else "holds 0 samples"
        raise ValueError(f"{path} {problem}: {remedy}")
    if promised is None:
        if error:
            seconds = f"{len(samples) / rate:.2f} s"
            warn(f"{path}: decoding stopped after {seconds} ({reason(error)}); these are used")
        return samples, rate
    # What the file holds. If decoding went well, that is what libsndfile found when it opened it.
    held = len(samples) if error or len(samples) < min(n_frames, file.frames) else file.frames
    if held < promised:
        what = f"{path} is cut off: {held / rate:.2f} s of {promised / rate:.2f} s can be read"
        if 2 * held < promised:
            raise ValueError(f"{what}; {remedy}")
        warn(f"{what} and used")
    return samples, rate


def reason(error):
    """What a library's exception says, for use inside a sentence."""
    return str(getattr(error, "error_string", error)).strip(" .") or "unknown error"


def decode(file, n_frames, frames_at_once=1 << 20):
    """Read n_frames, or as far as it goes. -> samples float32 (n, channels), the error or None

    Piece by piece: a broken header can claim terabytes.
    """
    pieces, start, error = [np.zeros((0, file.channels), np.float32)], 0, None
    while start < n_frames and not error:
        piece = np.empty((min(n_frames - start, frames_at_once), file.channels), np.float32)
        try:
            n = len(file.read(len(piece), out=piece))
        except soundfile.LibsndfileError as caught:
            n, error = file.tell() - start, caught
        if n == 0:
            break
        pieces.append(piece[:n])
        start += n
    return np.concatenate(pieces), error


def promised_frames(file):
    """How many frames the header says there are; None where that is an estimate or unknown."""
    if file.subtype.startswith(ESTIMATED) or file.frames > 2**60:  # the latter: a streamed flac
        return None
    # When there are fewer bytes than a header claims, libsndfile says so in its log alone.
    names = "data|SSND|BODY|Data Size|riff|Riff size"
    pattern = rf"^ *(?:{names}) *: *(\d+) \(should be (\d+)\)"
    if found := re.search(pattern, file.extra_info, re.MULTILINE):
        claimed, there = map(int, found.groups())
        if claimed < 0x7FFF0000 and there > 0:  # programs that write to a pipe claim 2³¹ or 2³²
            return round(file.frames * claimed / there)
    return file.frames


class Sound(soundfile.SoundFile):
    """soundfile seeks after every read to where it is, which in MPEG layers changes the samples."""

    def seekable(self):
        return False


@contextlib.contextmanager
def open_sound(path, n_zeros=0):
    """-> Sound, which of MPEG layers without a count of frames (a "Xing" header) gives all frames.

    n_zeros: see LongFile.
    """
    with Sound(path) as file:
        is_counted = True
        if file.subtype.startswith("MPEG"):
            start, stop, head = mpeg_stream(path)
            is_counted = b"Xing" in head or b"Info" in head
        if is_counted:
            yield file
            return
    with LongFile(path, start, stop, n_zeros) as stream, Sound(stream) as file:
        yield file


def mpeg_stream(path):
    """Where the MPEG layers of an mp3 or wav file begin and end, and the bytes of the first
    frame.
    """
    with open(path, "rb") as file:
        start, stop = 0, os.path.getsize(path)
        header = file.read(12)
        if header.startswith(b"RIFF"):  # then chunks: name, size, content, a zero if size is odd
            start, name, size = 12, None, 0
            while name not in (b"data", b""):
                file.seek(start + size + size % 2)
                name, size = file.read(4), int.from_bytes(file.read(4), "little")
                start = file.tell()
            return start, min(start + size, stop), file.read(4096)
        if header.startswith(b"ID3"):  # seven bits of the tag's size in a byte
            file.seek(10 + sum(byte << 7 * (9 - i) for i, byte in enumerate(header) if 6 <= i < 10))
        else:
            file.seek(0)
        return start, stop, file.read(4096)


class LongFile(io.FileIO):
    """The bytes from start to stop of a file; but it claims to be a hundred times as long.

    libsndfile estimates the length of MPEG layers from the first frame and the size of the file,
    and reads no further. With a variable bit rate that can be a quarter of the clip.
    n_zeros: so many follow, so that a last frame that was cut off is decoded too.
    """

    def __init__(self, path, start, stop, n_zeros=0):
        super().__init__(path)
        self.start, self.size, self.n_zeros = start, stop - start, n_zeros
        self.claimed, self.position = 100 * self.size + n_zeros, 0

    def seek(self, offset, whence=os.SEEK_SET):
        self.position = offset + (0, self.position, self.claimed)[whence]
        return self.position

    def tell(self):
        return self.position

    def readinto(self, buffer):
        n = 0  # the end of the file
        if self.position < self.size:
            super().seek(self.start + self.position)
            n = super().readinto(memoryview(buffer)[: self.size - self.position])
        # libmpg123 looks for a tag at the claimed end, and must be able to read there
        elif self.position < self.size + self.n_zeros or self.position >= self.claimed - 128:
            n = len(buffer)
            buffer[0:n] = bytes(n)
        self.position += n
        return n
