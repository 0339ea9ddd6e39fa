"""Reads the data sets from a folder, or fetches them from their publishers into a cache. Both ways are checked."""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from .download import DataError, cache, fetch, locked

# WikiText-2 as PyTorch's word_language_model example has it. The authors of WikiText had it at
# s3.amazonaws.com/research.metamind.io, which has refused since March 2024 (github.com/pytorch/text/issues/2247).
WIKITEXT2_URL = ("https://raw.githubusercontent.com/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8/"
                 "word_language_model/data/wikitext-2")
WIKITEXT2_SHA256 = {
    "train": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
    "valid": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
}
WIKITEXT2_ARCHIVES = ("wikitext-2.tar.xz", "wikitext-2-v1.zip")

OPENSLR_URL = "https://www.openslr.org/resources"


class Part(NamedTuple):
    """A part of LibriSpeech."""

    resource: int  # OpenSLR's: 12 is LibriSpeech, 31 Mini LibriSpeech
    md5: str  # checksum of <part>.tar.gz, from the resource's md5sum.txt
    clips: int
    copy_sha256: str = ""  # checksum of <part>.tar, the project's copy in Ogg Opus, where there is one


PARTS = {
    "train-clean-5": Part(31, "5df7d4e78065366204ca6845bb08f490", 1519,
                          "6739dc91c8961604a848736243b47e479a23a5a413a2176a149a21a827218279"),
    "dev-clean-2": Part(31, "6d7ab67ac6a1d2c993d050e16d61080d", 1089,
                        "70887226e1857dbb6be5e12accad672cdaaf213de2e70fb9c82ef0024d967f45"),
    "dev-clean": Part(12, "42e2234ba48799c1f50f24a7926300a1", 2703),
    "dev-other": Part(12, "c8d0bcc9cca99d4f8b62fcc847357931", 2864),
    "test-clean": Part(12, "32fa31d27d2e1cad72775fee3f4849a9", 2620),
    "test-other": Part(12, "fb5a50374b501bb3bac4815ee91d3135", 2939),
    "train-clean-100": Part(12, "2a93770f6d5c6c964bc36631d331a522", 28539),
    "train-clean-360": Part(12, "c0e676e450a7ff2f54aeade5171606fa", 104014),
    "train-other-500": Part(12, "d1a0fd59409feb2c614ce4d30c387708", 148688),
}

DAMAGE = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError)  # raised for damaged archives


class Clip(NamedTuple):
    """A recorded sentence of LibriSpeech."""

    id: str  # speaker, chapter and sentence, such as "1272-135031-0000"
    audio: Path  # 16 kHz mono: FLAC, or Ogg Opus in the project's copies; soundfile reads both
    words: str  # the transcript, in A-Z, apostrophe and space


# -- WikiText-2 --


def wikitext2(data: str | Path = "") -> dict[str, str]:
    """Returns the texts of WikiText-2 at word level: {"train": ..., "valid": ..., "test": ...}. Raises DataError.

    Args:
        data: a folder that holds, directly or in wikitext-2/, an archive (WIKITEXT2_ARCHIVES) or the three texts, named
            train.txt or wiki.train.tokens. If empty, the texts are fetched and cached.
    """
    texts = {}
    for split, expected in WIKITEXT2_SHA256.items():
        if data:
            where, content = _text(Path(data), split)
        else:
            name = f"{split}.txt"
            where = fetch(f"{WIKITEXT2_URL}/{name}", f"sha256:{expected}", cache() / "wikitext-2" / name)
            content = where.read_bytes()
        got = hashlib.sha256(content).hexdigest()
        if got != expected:
            raise _altered(where, "sha256", expected, f"{got} ({len(content)} bytes)")
        texts[split] = content.decode("utf-8")
    return texts


def _text(data: Path, split: str) -> tuple[Path, bytes]:
    """Returns where a split's text was found, and the text."""
    names = (f"{split}.txt", f"wiki.{split}.tokens")
    for folder in (data / "wikitext-2", data):
        for path in (folder / name for name in names):
            if path.is_file():
                return path, path.read_bytes()
        for path in (folder / name for name in WIKITEXT2_ARCHIVES):
            if path.is_file():
                try:
                    return path / names[0], _member(path, names)
                except DAMAGE as error:
                    raise _altered(path, f"a whole archive with {names[0]} of sha256", WIKITEXT2_SHA256[split],
                                   f"sha256 {_digest(path, 'sha256')} of the archive and {error}") from error
    raise DataError(f"data must be a folder with {names[0]}, {names[1]} or one of {', '.join(WIKITEXT2_ARCHIVES)} in "
                    f"wikitext-2/ (sha256 of {names[0]}: {WIKITEXT2_SHA256[split]}), got {data} without; leave data "
                    f"out to have WikiText-2 fetched")


def _member(archive: Path, names: tuple[str, ...]) -> bytes:
    """Returns the file with one of these names from any folder of the archive, or nothing if there is none."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as opened:
            return next((opened.read(each) for each in opened.namelist() if Path(each).name in names), b"")
    with tarfile.open(archive) as opened:
        for member in opened:
            if member.isfile() and Path(member.name).name in names:
                return opened.extractfile(member).read()
    return b""


# -- LibriSpeech --


def librispeech(part: str, data: str | Path = "") -> list[Clip]:
    """Returns the clips of a part of LibriSpeech, sorted by id, after unpacking their archive in the cache folder.

    The archive's checksum is compared each time it is used. An unpacked folder of the user's has no checksum, so there
    the clips are counted. Raises DataError; ValueError for an unknown part.

    Args:
        part: "train-clean-5" or "dev-clean-2" (Mini LibriSpeech, OpenSLR 31), or one of OpenSLR 12: "dev-clean",
            "test-clean", "dev-other", "test-other", "train-clean-100", "train-clean-360", "train-other-500".
        data: a folder that holds, directly or in mini_librispeech/ or LibriSpeech/, the part's archive (<part>.tar.gz,
            or <part>.tar of the project's copy) or its unpacked folder. If empty, the archive is fetched and cached.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    about = PARTS[part]
    name = f"{part}.tar.gz"
    if not data:
        folder = _unpacked_folder(part, about.md5)
        if not folder.exists():
            url = f"{OPENSLR_URL}/{about.resource}/{name}"
            _unpack(fetch(url, f"md5:{about.md5}", cache() / name), folder, "md5", about.md5)
        return _clips(folder, about)
    for place in (Path(data) / "mini_librispeech", Path(data) / "LibriSpeech", Path(data)):
        if (place / part).is_dir():
            return _clips(place / part, about)
        copy = place / f"{part}.tar"
        for path, kind, expected in ((place / name, "md5", about.md5), (copy, "sha256", about.copy_sha256)):
            if expected and path.is_file():
                got = _digest(path, kind)
                if got != expected:
                    raise _altered(path, kind, expected, f"{got} ({path.stat().st_size} bytes)")
                folder = _unpacked_folder(part, expected)
                _unpack(path, folder, kind, expected)
                return _clips(folder, about)
    raise DataError(f"data must be a folder with {name} (md5 {about.md5}), {part}.tar or {part}/ in it, in "
                    f"mini_librispeech/ or in LibriSpeech/, got {data} without; leave data out to have it fetched")


def _unpacked_folder(part: str, digest: str) -> Path:
    return cache() / f"{part}-{digest[:12]}"


def _unpack(archive: Path, folder: Path, kind: str, digest: str) -> None:
    """Unpacks the checked archive as `folder`, all of it or nothing. Does nothing if the folder is there."""
    with locked(folder):
        if folder.exists():
            return
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.partial-"))
        try:
            # Python before 3.10.12 and 3.11.4 has no filters. The archive is trusted anyway, by its checksum.
            safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            with tarfile.open(archive) as opened:
                opened.extractall(partial, **safely)
            os.rename(partial, folder)
        except (*DAMAGE, OSError) as error:
            raise DataError(f"{archive} ({kind} {digest}) must be unpacked to {folder}, got: {error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _clips(folder: Path, about: Part) -> list[Clip]:
    files = sorted(folder.rglob("*"))
    audio = {path.stem: path for path in files if path.suffix in (".flac", ".opus") and path.stat().st_size}
    clips = []
    for path in files:
        if path.name == "transcripts.txt" or path.name.endswith(".trans.txt"):
            for line in path.read_text(encoding="utf-8").splitlines():
                clip, _, words = line.partition(" ")
                if clip not in audio:
                    raise DataError(f"{folder} must have {clip}.flac or {clip}.opus, which {path} names, got none or "
                                    f"an empty one; delete the folder and unpack it again")
                clips.append(Clip(clip, audio[clip], words))
    if len(clips) != about.clips:
        raise DataError(f"{folder} must have {about.clips} clips with transcripts (of the archive with md5 "
                        f"{about.md5}), got {len(clips)}; delete the folder and unpack it again")
    return sorted(clips)


# -- both --


def _digest(path: Path, kind: str) -> str:
    digest = hashlib.new(kind)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _altered(path: Path, what: str, expected: str, got: str) -> DataError:
    return DataError(f"{path} must have {what} {expected}, got {got}: truncated or altered; replace it")
