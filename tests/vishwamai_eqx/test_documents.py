"""Reading: each format gives back its documents, byte for byte, in blocks of bounded size."""

import gzip
import json
from pathlib import Path

import duckdb
import pytest

from vishwamai_eqx import documents
from vishwamai_eqx.config import DataConfig

TEXTS = ["one\nline two\r\n", "\ufeffünï 漢字 😀 'quoted' \"twice\" ▁", "", "\ttabs\n\n\n", "x" * 50]


def whole(path: Path, text_column: str = "text") -> list[str]:
    found, current = [], ""
    for text, last in documents.read(path, text_column):
        current += text
        if last:
            found.append(current)
            current = ""
    assert not current
    return found


@pytest.fixture
def records(tmp_path) -> Path:
    lines = [json.dumps({"id": index, "text": text, 'a "b"': str(index)}) for index, text in enumerate(TEXTS)]
    content = ("\n".join(lines) + "\n").encode()
    (tmp_path / "r.jsonl").write_bytes(content)
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(content))
    with duckdb.connect() as connection:
        connection.execute("CREATE TABLE r AS SELECT * FROM read_json(?)", [str(tmp_path / "r.jsonl")])
        connection.execute(f"COPY r TO '{tmp_path}/r.parquet'")
        connection.execute(f"COPY r TO '{tmp_path}/r.jsonl.zst' (FORMAT json, COMPRESSION zstd)")
    return tmp_path


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz", "r.jsonl.zst", "r.parquet"])
def test_a_record_is_a_document(records, name):
    assert whole(records / name) == TEXTS
    assert whole(records / name, 'a "b"') == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", ["r[1]", "r*1", "r?1", "text=web/r"])
def test_a_path_is_no_pattern_and_no_column(records, name, suffix):
    """Of another file that the name would match as a pattern nothing is read, and no text is a folder's name."""
    path = records / f"{name}{suffix}"
    path.parent.mkdir(exist_ok=True)
    (records / f"r{suffix}").rename(path)
    (records / f"r1{suffix}").write_text("{'another': 'file'}")
    (records / f"r11{suffix}").write_text("{'another': 'file'}")
    assert whole(path) == TEXTS


def test_a_line_that_is_nested_too_deep_is_named(tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text(f'{{"text": {"[" * 100_000}{"]" * 100_000}}}\n{{"text": }}\n')
    with pytest.raises(ValueError, match=r"deep.jsonl, line 1: nested too deep; mend or remove the line"):
        whole(path)


def zstd(content: bytes) -> bytes:
    """A frame of blocks that are not compressed (RFC 8878)."""
    starts = range(0, len(content), 1 << 17)
    blocks = [(start == starts[-1], content[start : start + (1 << 17)]) for start in starts]
    return b"\x28\xb5\x2f\xfd\0\x58" + b"".join((len(b) << 3 | last).to_bytes(3, "little") + b for last, b in blocks)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "b"',
        b'{"text": "\xc3"}',
        b'{"text": "\\ud800"}',
        b'{"text": "\0"}',
        b'{"text": "\x1f,\x1e;\t|"}',
        b'{"text": "b", "c": \xff}',
        b'{"body": "b", "id": 1}',
        b'{"text": null}',
        b'["b"]',
        b'"',
        b"NULL",
        b"#",
        b'{"text": ' + b"[" * 100_000,
        b'{"text": "' + b"long " * (1 << 23) + b'"}',
        "{漢字}".encode(),
    ],
    ids=lambda line: line[:30].decode(errors="replace"),
)
def test_a_bad_line_is_named_however_it_is_compressed(tmp_path, line, end):
    good = ['{"text": "漢字 \\"1\\", 2"}'.encode(), b"", b" \t"] * 2000
    content = end.join([*good, line, *good])
    sentences = set()
    for suffix, compress in ((".jsonl", bytes), (".jsonl.gz", gzip.compress), (".jsonl.zst", zstd)):
        path = tmp_path / f"bad{suffix}"
        path.write_bytes(compress(content))
        with pytest.raises(ValueError) as refused:
            whole(path)
        sentences.add(str(refused.value).replace(suffix, ""))
    (sentence,) = sentences
    assert sentence.startswith(f"{tmp_path}/bad, line 6001: ")


def test_a_cut_zstd_file_is_never_read_as_a_shorter_one(records):
    path, record = records / "r.jsonl.zst", b'{"text": "a"}\n'
    skipped = b"\x50\x2a\x4d\x18\x05\0\0\0other"
    for content in (path.read_bytes(), zstd(record * 20_000), zstd(record)):
        path.write_bytes(content + skipped + zstd(record * 3))
        assert whole(path)[-3:] == ["a"] * 3
        step = len(content) // 8 + 1
        for cut in (*range(1, len(content), step), *range(len(content) - 4, len(content))):
            path.write_bytes(content[:cut])
            with pytest.raises(ValueError, match=r"r\.jsonl\.zst: damaged or cut short; copy or make it again"):
                whole(path)


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
def test_a_text_file_is_a_document_whatever_the_block(tmp_path, monkeypatch, size):
    monkeypatch.setattr(documents, "BLOCK_BYTES", size)
    text = "".join(TEXTS) * 3
    path = tmp_path / "a.md"
    path.write_bytes(text.encode())
    blocks = list(documents.read(path, "text"))
    assert "".join(text for text, _ in blocks) == text
    assert [last for _, last in blocks] == [False] * (len(blocks) - 1) + [True]
    # After a line, unless a block holds none.
    assert all(block.endswith("\n") or "\n" not in block for block, _ in blocks[:-1])


def test_long_records_come_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 10)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    assert whole(tmp_path / "a.jsonl") == TEXTS
    assert max(len(text) for text, _ in documents.read(tmp_path / "a.jsonl", "text")) == 10


def test_a_file_belongs_to_the_first_glob_that_matches(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = documents.find_files(DataConfig(files=(f"{tmp_path}/a.txt", f"{tmp_path}/**/*.txt")))
    assert [[path.name for path in source] for source in found] == [["a.txt"], ["b.txt", "c.txt"]]


def test_a_path_that_looks_like_a_pattern_is_a_path(tmp_path):
    for name in ("br[1].txt", "br1.txt"):
        (tmp_path / name).write_text(name)
    (found,) = documents.find_files(DataConfig(files=(f"{tmp_path}/br[1].txt",)))
    assert [path.name for path in found] == ["br[1].txt"]


def test_a_file_of_several_names_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("folder/a.txt", "folder/b.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "folder" / "again.txt").symlink_to("b.txt")
    (tmp_path / "other").symlink_to("folder")
    found = documents.find_files(DataConfig(files=("folder/*.txt", f"{tmp_path}/**/*.txt")))
    assert [[path.name for path in source] for source in found] == [["a.txt", "again.txt"], ["c.txt"]]
    with pytest.raises(ValueError, match="earlier globs match all of its files"):
        documents.find_files(DataConfig(files=("./folder/*.txt", "other/*.txt")))


def test_the_standard_library_is_there_without_tests_or_tables():
    (files,) = documents.find_files(DataConfig())
    assert 5e6 < sum(path.stat().st_size for path in files) < 30e6
    folders = {part for path in files for part in path.parts[-4:-1]}
    assert not folders & documents.NOT_LIBRARY
    assert {"json", "asyncio"} <= folders
