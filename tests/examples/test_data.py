"""The examples' data: checked, fetched from a server on this machine, resumed, and refused where they are wrong."""
import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("pooch")
pytest.importorskip("rich")

from examples.data import datasets, download  # noqa: E402
from examples.data.download import DataError  # noqa: E402

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_wikitext = pytest.mark.skipif(not (SHARED / "wikitext-2").exists(), reason="needs shared/data/wikitext-2")
needs_librispeech = pytest.mark.skipif(not (SHARED / "mini_librispeech").exists(),
                                       reason="needs shared/data/mini_librispeech")
CONTENT = bytes(range(256)) * 4000  # about 1 MB, several reads long
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the server's `files`, with HTTP Range if `ranges`; `breaks` says after how many bytes to hang up."""

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range", "")
        server.requests.append(asked)
        if self.path not in server.files:
            self.send_error(404, "Not Found")
            return
        content = server.files[self.path]
        begin = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        if begin and begin >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        end = server.breaks.pop(0) if server.breaks else None
        self.wfile.write(content[begin:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.files, running.ranges, running.breaks, running.requests = {"/file.bin": CONTENT}, True, [], []
        running.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A cache of one's own, no proxy, no waiting between tries, and small reads, so that breaks lose nothing."""
    monkeypatch.setattr(download, "CHUNK", 100)
    monkeypatch.setattr(download, "cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(datasets, "cache", download.cache)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("pooch.core.time.sleep", lambda _: None)


def fetch(server, tmp_path, checksum=f"sha256:{SHA256}"):
    return download.fetch(f"{server.url}/file.bin", checksum, tmp_path / "cache" / "file.bin")


def left(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock"))


# -- downloads --


def test_a_file_is_fetched_once_and_then_found_without_a_network(server, tmp_path):
    path = fetch(server, tmp_path)
    assert path.read_bytes() == CONTENT and left(tmp_path) == ["file.bin"]
    assert server.requests == [""]
    server.files.clear()
    assert fetch(server, tmp_path) == path and server.requests == [""]


def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path):
    server.breaks += [300_000, 700_000]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == ["", "bytes=300000-", "bytes=700000-"] and left(tmp_path) == ["file.bin"]


def test_it_goes_on_in_a_later_run(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "RETRIES", 0)
    server.breaks += [300_000]
    with pytest.raises(DataError, match=f"{server.url}/file.bin .*{SHA256}.* must be fetched to .*file.bin, got: "):
        fetch(server, tmp_path)
    assert (tmp_path / "cache" / "file.bin.partial").read_bytes() == CONTENT[:300_000]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == ["", "bytes=300000-"]


def test_a_server_without_ranges_is_read_from_the_start(server, tmp_path):
    server.ranges = False
    server.breaks += [300_000]
    assert fetch(server, tmp_path).read_bytes() == CONTENT and server.requests[1] == "bytes=300000-"


@pytest.mark.parametrize("partial, requests", [
    (CONTENT, [f"bytes={len(CONTENT)}-"]),  # killed before it got its name
    (CONTENT + b"more", [f"bytes={len(CONTENT) + 4}-", ""]),
    (b"of another file", ["bytes=15-", ""]),
])
def test_what_an_earlier_run_left_is_used_if_it_is_right(server, tmp_path, partial, requests):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "file.bin.partial").write_bytes(partial)
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == requests and left(tmp_path) == ["file.bin"]


def test_a_wrong_checksum_is_told_and_nothing_is_kept(server, tmp_path):
    wrong = "0" * 64
    with pytest.raises(DataError, match="must be fetched") as raised:
        fetch(server, tmp_path, f"sha256:{wrong}")
    assert wrong in str(raised.value) and SHA256 in str(raised.value) and "file.bin" in str(raised.value)
    assert left(tmp_path) == []


def test_an_altered_file_in_the_cache_is_fetched_again(server, tmp_path):
    fetch(server, tmp_path).write_bytes(CONTENT[:-1])
    assert fetch(server, tmp_path).read_bytes() == CONTENT and len(server.requests) == 2


def test_an_address_without_a_file_is_told_at_once(server, tmp_path):
    server.files.clear()
    with pytest.raises(DataError, match=f"{server.url}/file.bin must be there, got HTTP status 404"):
        fetch(server, tmp_path)
    assert server.requests == [""]


def test_no_network_is_told_plainly(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match="must be fetched to .*, got: .*try again, or pass a folder"):
        fetch(server, tmp_path)


def test_a_full_disk_is_told_plainly(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "_copy", full)
    with pytest.raises(DataError, match="must be fetched to .*No space left"):
        fetch(server, tmp_path)


def test_two_at_once_download_once(server, tmp_path):
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(server, tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4 and len(server.requests) == 1


def test_progress_is_drawn_on_a_terminal_only(server, tmp_path, monkeypatch, capsys):
    fetch(server, tmp_path).unlink()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    server.breaks += [300_000]
    fetch(server, tmp_path)
    drawn = capsys.readouterr().err
    assert "file.bin" in drawn and "0.3/1.0 MB" in drawn and "1.0/1.0 MB" in drawn


# -- WikiText-2 --


@pytest.fixture
def texts(monkeypatch):
    """A corpus in WikiText-2's place."""
    made = {split: f" \n = {split} = \n naïve words <unk> \n" for split in ("train", "valid", "test")}
    sums = {split: hashlib.sha256(text.encode()).hexdigest() for split, text in made.items()}
    monkeypatch.setattr(datasets, "WIKITEXT2_SHA256", sums)
    return made


def write_tar(path, members):
    with tarfile.open(path, "w:xz" if path.suffix == ".xz" else "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("layout", ["{}.txt", "wiki.{}.tokens", "wikitext-2/{}.txt", "wikitext-2/wiki.{}.tokens"])
def test_the_texts_are_read_from_files(tmp_path, texts, layout):
    (tmp_path / "wikitext-2").mkdir()
    for split, text in texts.items():
        (tmp_path / layout.format(split)).write_bytes(text.encode())
    assert datasets.wikitext2(tmp_path) == datasets.wikitext2(str(tmp_path)) == texts


def test_the_texts_are_read_from_either_archive(tmp_path, texts):
    for folder in ("tar", "zip"):
        (tmp_path / folder).mkdir()
    write_tar(tmp_path / "tar" / "wikitext-2.tar.xz", {f"{split}.txt": text.encode() for split, text in texts.items()})
    with zipfile.ZipFile(tmp_path / "zip" / "wikitext-2-v1.zip", "w") as archive:
        for split, text in texts.items():
            archive.writestr(f"wikitext-2/wiki.{split}.tokens", text)
    assert datasets.wikitext2(tmp_path / "tar") == datasets.wikitext2(tmp_path / "zip") == texts


def test_the_texts_are_fetched(server, tmp_path, texts, monkeypatch):
    server.files = {f"/{split}.txt": text.encode() for split, text in texts.items()}
    monkeypatch.setattr(datasets, "WIKITEXT2_URL", server.url)
    assert datasets.wikitext2() == texts
    server.files = {}
    assert datasets.wikitext2() == texts and len(server.requests) == 3


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content.replace(b"words", b"Words")])
def test_an_altered_text_is_named_with_both_checksums(tmp_path, texts, change):
    for split, text in texts.items():
        (tmp_path / f"{split}.txt").write_bytes(text.encode())
    altered = change(texts["valid"].encode())
    (tmp_path / "valid.txt").write_bytes(altered)
    with pytest.raises(DataError, match="valid.txt must have sha256 .*, got .*truncated or altered") as raised:
        datasets.wikitext2(tmp_path)
    assert datasets.WIKITEXT2_SHA256["valid"] in str(raised.value)
    assert hashlib.sha256(altered).hexdigest() in str(raised.value)


@pytest.mark.parametrize("name", datasets.WIKITEXT2_ARCHIVES)
def test_a_truncated_archive_is_named_with_both_checksums(tmp_path, texts, name):
    noise = b"".join(hashlib.sha256(bytes([i])).digest() for i in range(256))  # does not compress away
    path = tmp_path / name
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("wiki.train.tokens", noise)
    else:
        write_tar(path, {"train.txt": noise})
    path.write_bytes(path.read_bytes()[:4000])
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=f"{name} must have a whole archive .*truncated or altered") as raised:
        datasets.wikitext2(tmp_path)
    assert datasets.WIKITEXT2_SHA256["train"] in str(raised.value) and got in str(raised.value)


def test_an_archive_without_a_text_and_an_empty_folder_are_told(tmp_path, texts):
    with pytest.raises(DataError, match="data must be a folder with train.txt, .*wikitext-2.tar.xz"):
        datasets.wikitext2(tmp_path)
    write_tar(tmp_path / "wikitext-2.tar.xz", {"train.txt": texts["train"].encode()})
    with pytest.raises(DataError, match=r"valid.txt must have sha256 .*\(0 bytes\)"):
        datasets.wikitext2(tmp_path)


@needs_wikitext
def test_the_shared_wikitext2_is_the_one_expected():
    texts = datasets.wikitext2(SHARED)
    lengths = {split: sum(len(line.split()) + 1 for line in text.split("\n")[:-1]) for split, text in texts.items()}
    assert lengths == {"train": 2_088_628, "valid": 217_646, "test": 245_569}


# -- LibriSpeech --


WORDS = {"84-1-0000": "GO DO YOU HEAR", "84-1-0001": "IT'S HERE", "174-2-0000": "NO"}


@pytest.fixture
def part(monkeypatch):
    """Three silent clips as the publisher lays them out and as the project's copy does: ({name: content}, same)."""
    published, copied = {}, {"dev-clean-2/transcripts.txt": b""}
    for clip, words in WORDS.items():
        speaker, chapter, _ = clip.split("-")
        folder, line = f"LibriSpeech/dev-clean-2/{speaker}/{chapter}", f"{clip} {words}\n".encode()
        published[f"{folder}/{clip}.flac"] = copied[f"dev-clean-2/{clip}.opus"] = b"audio of " + clip.encode()
        listing = f"{folder}/{speaker}-{chapter}.trans.txt"
        published[listing] = published.get(listing, b"") + line
        copied["dev-clean-2/transcripts.txt"] += line
    monkeypatch.setitem(datasets.PARTS, "dev-clean-2", datasets.PARTS["dev-clean-2"]._replace(clips=3))
    return published, copied


def register(monkeypatch, path):
    """Makes the archive the one that is expected."""
    content = path.read_bytes()
    sums = {"md5": hashlib.md5(content).hexdigest(), "copy_sha256": hashlib.sha256(content).hexdigest()}
    monkeypatch.setitem(datasets.PARTS, "dev-clean-2", datasets.PARTS["dev-clean-2"]._replace(**sums))


def assert_clips(clips, suffix):
    assert [(clip.id, clip.words) for clip in clips] == sorted(WORDS.items())
    for clip in clips:
        assert clip.audio.name == clip.id + suffix and clip.audio.read_bytes() == b"audio of " + clip.id.encode()


@pytest.mark.parametrize("folder", [".", "LibriSpeech", "mini_librispeech"])
def test_clips_are_read_from_archives_and_folders(tmp_path, part, monkeypatch, folder):
    for i, (name, members, suffix) in enumerate((("dev-clean-2.tar.gz", part[0], ".flac"),
                                                 ("dev-clean-2.tar", part[1], ".opus"))):
        place = tmp_path / str(i) / folder
        place.mkdir(parents=True)
        write_tar(place / name, members)
        register(monkeypatch, place / name)
        for _ in range(2):  # unpacked, then found unpacked
            clips = datasets.librispeech("dev-clean-2", tmp_path / str(i))
            assert_clips(clips, suffix)
            assert clips[0].audio.is_relative_to(tmp_path / "cache")
        (place / name).unlink()
        for member, content in members.items():
            path = place / member.removeprefix("LibriSpeech/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        clips = datasets.librispeech("dev-clean-2", tmp_path / str(i))
        assert_clips(clips, suffix)
        assert clips[0].audio.is_relative_to(place)


def test_clips_are_fetched_and_need_their_archive_no_more_once_unpacked(server, tmp_path, part, monkeypatch):
    write_tar(tmp_path / "made.tar.gz", part[0])
    register(monkeypatch, tmp_path / "made.tar.gz")
    server.files = {"/31/dev-clean-2.tar.gz": (tmp_path / "made.tar.gz").read_bytes()}
    server.breaks += [200]
    monkeypatch.setattr(datasets, "OPENSLR_URL", server.url)
    assert_clips(datasets.librispeech("dev-clean-2"), ".flac")
    assert server.requests == ["", "bytes=200-"]
    (tmp_path / "cache" / "dev-clean-2.tar.gz").unlink()
    assert_clips(datasets.librispeech("dev-clean-2"), ".flac")
    assert len(server.requests) == 2


@pytest.mark.parametrize("name, kind", [("dev-clean-2.tar.gz", "md5"), ("dev-clean-2.tar", "sha256")])
def test_an_altered_archive_is_named_with_both_checksums_even_when_unpacked(tmp_path, part, monkeypatch, name, kind):
    path = tmp_path / name
    write_tar(path, part[0])
    register(monkeypatch, path)
    expected = hashlib.new(kind, path.read_bytes()).hexdigest()
    datasets.librispeech("dev-clean-2", tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{name} must have {kind} .*truncated or altered") as raised:
        datasets.librispeech("dev-clean-2", tmp_path)
    assert expected in str(raised.value) and hashlib.new(kind, path.read_bytes()).hexdigest() in str(raised.value)


def test_an_archive_that_cannot_be_unpacked_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "dev-clean-2.tar.gz"
    path.write_bytes(b"no archive at all")
    register(monkeypatch, path)
    with pytest.raises(DataError, match="dev-clean-2.tar.gz .* must be unpacked to"):
        datasets.librispeech("dev-clean-2", tmp_path)
    assert left(tmp_path) == []


@pytest.mark.parametrize("lost, message", [
    ("dev-clean-2/84-1-0001.opus", "must have 84-1-0001.flac or 84-1-0001.opus"),
    ("dev-clean-2/transcripts.txt", "must have 3 clips with transcripts .*, got 0"),
])
def test_a_folder_that_lacks_something_is_named(tmp_path, part, lost, message):
    for name, content in part[1].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content if name != lost else b"")
    with pytest.raises(DataError, match=f"{tmp_path}/dev-clean-2 {message}"):
        datasets.librispeech("dev-clean-2", tmp_path)


def test_missing_and_unknown_parts_are_told(tmp_path):
    with pytest.raises(DataError, match=r"data must be a folder with test-clean.tar.gz \(md5 32fa31d27d2e1cad"):
        datasets.librispeech("test-clean", tmp_path)
    with pytest.raises(ValueError, match="part must be one of train-clean-5, .*, got 'dev'"):
        datasets.librispeech("dev", tmp_path)


@needs_librispeech
def test_the_shared_mini_librispeech_is_the_one_expected():
    clips = datasets.librispeech("dev-clean-2", SHARED)
    assert len(clips) == 1089 and clips[0].id == "1272-135031-0000"
    assert clips[0].words.startswith("BECAUSE YOU WERE SLEEPING") and clips[0].audio.stat().st_size == 22992
