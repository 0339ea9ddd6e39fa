"""Computes log-mel features of LibriSpeech's clips once and caches them; encodes and decodes transcripts.

Audio is 16 kHz mono. A frame is 25 ms long, and one begins every 10 ms. Its features are the logarithms of its power in
`n_mels` bands that are equally wide on the mel scale. Each band of each clip is normalized to mean 0 and standard
deviation 1.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..training import checkpoint
from .datasets import Clip
from .download import DataError, cache, locked

SAMPLE_RATE = 16_000  # Hz
WINDOW = 400  # samples: 25 ms
HOP = 160  # samples: 10 ms
FFT = 1024  # windows are padded with zeros to this length, so that the narrowest of 128 bands holds a frequency
FLOOR = 1e-8  # least power of a band before the logarithm, for digital silence
DEVIATION_FLOOR = 1e-3  # least standard deviation of a band, for silent clips
CHARACTERS = " '" + "abcdefghijklmnopqrstuvwxyz"
BLANK = 0  # the class of CTC's blank; character i of CHARACTERS is class i + 1
CLASSES = 1 + len(CHARACTERS)
FORMAT = 1  # the cache's; features of another number are not found


def mel_filters(n_mels: int) -> Tensor:
    """Returns the bands' weights, (FFT / 2 + 1, n_mels).

    They are triangles of height 1 whose corners are equally spaced from 0 to 8 kHz on the mel scale,
    mel(f) = 2595 log10(1 + f / 700 Hz).
    """
    top = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, n_mels + 2, dtype=torch.float64) / 2595) - 1)
    frequencies = torch.linspace(0, SAMPLE_RATE / 2, FFT // 2 + 1, dtype=torch.float64)[:, None]
    low, middle, high = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    filters = torch.minimum(rising, falling).clamp(min=0)
    if not filters.any(dim=0).all():
        raise ValueError(f"n_mels must be small enough for {FFT} frequencies, such as 40, 80 or 128, got {n_mels}")
    return filters.float()


def log_mel(samples: Tensor, filters: Tensor) -> Tensor:
    """Returns the features of a clip, (1 + (n - WINDOW) // HOP, n_mels).

    Args:
        samples: (n,) in [-1, 1], n >= WINDOW.
        filters: mel_filters(n_mels).
    """
    windows = samples.unfold(0, WINDOW, HOP) * torch.hann_window(WINDOW)
    power = torch.fft.rfft(windows, n=FFT).abs().square()
    features = (power @ filters).clamp(min=FLOOR).log()
    deviation, mean = torch.std_mean(features, dim=0, correction=0)
    return (features - mean) / deviation.clamp(min=DEVIATION_FLOOR)


def encode(words: str) -> list[int]:
    """Returns the class of each character of a transcript, whatever its case."""
    return [CHARACTERS.index(character) + 1 for character in words.lower()]


def decode(best: Sequence[int]) -> str:
    """Decodes CTC greedily from the best class of each frame: repeats count once, then blanks are dropped."""
    return "".join(CHARACTERS[label - 1] for label, _ in itertools.groupby(best) if label != BLANK)


@dataclass(frozen=True)
class Corpus:
    """Clips as a net reads them. `features` is the cache file, mapped to memory and not read into it."""

    features: Tensor  # (all frames of all clips, n_mels), float16
    starts: list[int]  # first frame of each clip, and the number of all frames at the end
    words: list[str]  # transcripts in lower case

    def __len__(self) -> int:
        return len(self.words)

    def frames(self, index: int) -> int:
        """Returns the number of a clip's frames."""
        return self.starts[index + 1] - self.starts[index]

    def __getitem__(self, index: int) -> Tensor:
        """Returns a clip's features, (frames, n_mels), float32."""
        return self.features[self.starts[index] : self.starts[index + 1]].float()


def load(clips: Sequence[Clip], n_mels: int) -> Corpus:
    """Returns the clips with their features, from the cache folder (`download.cache`) or computed here.

    The cache's key covers the settings and each clip's name, transcript and size of file. If the cached file is
    damaged, standard error says so and the features are computed again. Several processes may call this at once: one of
    them computes. It then has all features in memory, twice while it writes (18 GB for 100 hours at 128 bands).

    Raises DataError for clips that are no audio, not 16 kHz mono or too short, and for transcripts with other
    characters.
    """
    about = {"format": FORMAT, "n_mels": n_mels, "window": WINDOW, "hop": HOP, "fft": FFT, "floor": FLOOR}
    listed = [(clip.id, clip.words, clip.audio.stat().st_size) for clip in clips]
    key = hashlib.sha256(json.dumps([about, listed]).encode()).hexdigest()[:16]
    folder = cache() / "features" / key
    with locked(folder):
        found = _cached(folder)
        if found is None:
            with checkpoint.only_writer(folder):  # it also clears what a killed process left
                _fill(folder, clips, n_mels)
            found = _cached(folder)
    if found is None:
        raise RuntimeError(f"{folder} must hold what was just written to it, got something else; check the disk")
    return found


def _cached(folder: Path) -> Corpus | None:
    damaged = True
    try:
        loaded = checkpoint.load(folder)
    except RuntimeError:
        pass
    else:
        if loaded is None:
            return None
        features, info = loaded[0].get("features"), loaded[1]
        written = info.pop("crc32", None)
        damaged = features is None or written != _checksum(features, info)
    if damaged:
        print(f"{folder / checkpoint.NAME} is damaged: its features are computed again", file=sys.stderr)
        return None
    return Corpus(features, **info)


def _checksum(features: Tensor, info: dict[str, list]) -> int:
    return zlib.crc32(json.dumps(info, sort_keys=True).encode(), zlib.crc32(features.numpy().data))


def _fill(folder: Path, clips: Sequence[Clip], n_mels: int) -> None:
    from rich.console import Console
    from rich.progress import track

    filters, made, words = mel_filters(n_mels), [], []
    bar = {"console": Console(stderr=True), "transient": True, "disable": not sys.stderr.isatty()}
    for clip in track(clips, "log-mel features", **bar):
        words.append(_transcript(clip))
        made.append(log_mel(_samples(clip), filters).half())
    starts = torch.tensor([0, *map(len, made)]).cumsum(0).tolist()
    features = torch.cat(made)
    info = {"starts": starts, "words": words}
    checkpoint.save(folder, {"features": features}, {**info, "crc32": _checksum(features, info)})


def _transcript(clip: Clip) -> str:
    words = clip.words.lower()
    strange = sorted(set(words) - set(CHARACTERS))
    if strange or not words.strip():
        raise DataError(f"the transcript of {clip.id} must be letters, apostrophes and spaces, got {clip.words!r}; "
                        "fetch the data again")
    return words


def _samples(clip: Clip) -> Tensor:
    import soundfile

    try:
        samples, rate = soundfile.read(clip.audio, dtype="float32")
    except (soundfile.LibsndfileError, OSError) as error:
        raise DataError(f"{clip.audio} must be a sound file that libsndfile reads, got: {error}; "
                        "fetch the data again") from error
    if rate != SAMPLE_RATE or samples.ndim != 1 or len(samples) < WINDOW:
        channels = 1 if samples.ndim == 1 else samples.shape[1]
        raise DataError(f"{clip.audio} must be {SAMPLE_RATE} Hz mono and have at least {WINDOW} samples, got {rate} "
                        f"Hz, {channels} channel(s), {len(samples)} samples; fetch the data again")
    return torch.from_numpy(samples)
