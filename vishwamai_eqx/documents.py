"""Text on disk as documents: which files there are, and what is in them, a block at a time."""

import codecs
import contextlib
import glob
import gzip
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb

from vishwamai_eqx.config import DataConfig

TEXT_SUFFIXES = (".txt", ".md", ".py")
JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET_SUFFIXES = (".parquet",)
SUFFIXES = TEXT_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES
# DuckDB holds a line of JSON as a whole, and no longer one than this.
LINE_BYTES = 16 << 20
# A file is read in blocks of at most this many bytes, so that memory does not grow with the longest document.
BLOCK_BYTES = 1 << 20
# Folders under the standard library that are installed packages, tests, or one table over and over.
NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}


def find_files(data: DataConfig) -> list[list[Path]]:
    """The files that each glob matches, in order of path; one that has several names is read by the first."""
    if not data.files:
        return [_standard_library()]
    seen: set[tuple[int, int]] = set()
    sources = []
    for pattern in data.files:
        # What a shell has made of a pattern is no pattern, whatever the file is called.
        names = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
        matches = sorted(name for name in names if os.path.isfile(name))
        if not matches:
            raise ValueError(f"data.files={pattern!r}: no file matches; give a glob of files that are there")
        for name in matches:
            if not name.endswith(SUFFIXES):
                raise ValueError(f"{name}: not one of {' '.join(SUFFIXES)}; narrow data.files={pattern!r}")
        files = {}
        for name in matches:
            status = os.stat(name)
            files.setdefault((status.st_dev, status.st_ino), Path(name))
        sources.append([path for file, path in files.items() if file not in seen])
        if not sources[-1]:
            raise ValueError(f"data.files={pattern!r}: earlier globs match all of its files; leave it out")
        seen.update(files)
    return sources


def _standard_library() -> list[Path]:
    files = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = sorted(name for name in folders if name not in NOT_LIBRARY)
        files += [Path(folder, name) for name in sorted(names) if name.endswith((".py", ".txt"))]
    return [path for path in files if path.stat().st_size > 0]


def read(path: Path, text_column: str) -> Iterator[tuple[str, bool]]:
    """A file's documents in order, in blocks that end after a line, each with whether it ends its document.

    Line ends, byte-order marks and all else stay as they are.
    """
    try:
        if path.name.endswith(TEXT_SUFFIXES):
            yield from _read_text(path)
            return
        found = False
        for text in _read_records(path, text_column):
            found = True
            for start in range(0, len(text) or 1, BLOCK_BYTES):
                yield text[start : start + BLOCK_BYTES], start + BLOCK_BYTES >= len(text)
        if not found:
            raise ValueError(f"{path}: empty; leave it out of data.files")
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); mend that or leave it out of data.files"
        ) from None


def _read_text(path: Path) -> Iterator[tuple[str, bool]]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    size, kept, pending = 0, "", 0
    with path.open("rb") as file:
        while True:
            content = file.read(BLOCK_BYTES)
            last = len(content) < BLOCK_BYTES
            if b"\0" in content:
                raise ValueError(f"{path}: binary, with a zero byte at {size + content.index(0)}; leave it out")
            try:
                kept += decoder.decode(content, final=last)
            except UnicodeDecodeError as error:
                where = size - pending + error.start
                raise ValueError(
                    f"{path}: not UTF-8 ({error.reason} at byte {where}); convert it or leave it out"
                ) from None
            pending = len(decoder.getstate()[0])
            size += len(content)
            if last:
                if size == 0:
                    raise ValueError(f"{path}: empty; leave it out of data.files")
                yield kept, True
                return
            cut = kept.rfind("\n") + 1 or len(kept)
            yield kept[:cut], False
            kept = kept[cut:]


def _read_records(path: Path, text_column: str) -> Iterator[str]:
    """The named column of a JSON-lines or Parquet file."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{os.fsencode(path)!r}: its name is not UTF-8, by which DuckDB opens files; rename it"
        ) from None
    is_json = path.name.endswith(JSON_SUFFIXES)
    column = '"' + text_column.replace('"', '""') + '"'
    quoted = "'" + text_column.replace("'", "''") + "'"
    # As a pattern that this file alone matches; and what folders are called is none of its columns.
    name, options = glob.escape(str(path)), "hive_partitioning=false"
    if (path.name.endswith(".zst") and not _ends_whole(path)) or (path.name.endswith(".gz") and not _adds_up(path)):
        raise ValueError(_damaged(path))
    # One thread: DuckDB then holds one part of the file at a time.
    with duckdb.connect(config={"threads": 1}) as connection:
        if is_json:
            # As VARCHAR numbers, lists and objects would be text too.
            options += f", records=true, maximum_object_size={LINE_BYTES}, columns={{{quoted}: 'JSON'}}"
            column = f"CASE json_type({column}) WHEN 'VARCHAR' THEN {column}->>'$' END"
            source = f"read_json(?, format='newline_delimited', {options})"
        else:
            source = f"read_parquet(?, {options})"
        try:
            described = connection.execute(f"DESCRIBE SELECT * FROM {source}", [name]).fetchall()
            kinds = {each: kind for each, kind, *_ in described}
            if kinds.get(text_column) != ("JSON" if is_json else "VARCHAR"):
                texts = [repr(each) for each, kind in kinds.items() if kind == "VARCHAR"]
                fix = (
                    f"set data.text_column to {' or '.join(texts)}"
                    if texts
                    else "it has no column of text; leave it out"
                )
                raise ValueError(f"{path}: no text column {text_column!r}; {fix}")
            cursor = connection.execute(f"SELECT {column} FROM {source}", [name])
            number = 0
            while rows := cursor.fetchmany(256):
                for (text,) in rows:
                    number += 1
                    if text is None:
                        where = _bad_line(path, text_column) if is_json else None
                        raise ValueError(
                            where
                            or f"{path}, record {number}: no text in column {text_column!r}; mend or remove the record"
                        )
                    yield text
        except duckdb.Error as error:
            where = _bad_line(path, text_column) if is_json else None
            # DuckDB's own words are for someone who wrote a query; they stay with the exception.
            raise ValueError(where or _damaged(path)) from error


def _ends_whole(path: Path) -> bool:
    """Whether no zstd frame is cut short (RFC 8878), which DuckDB takes for the end of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:

        def number(count: int) -> int:
            return int.from_bytes(file.read(count), "little")

        while file.tell() < size:
            if number(4) & ~15 == 0x184D2A50:
                # A frame to be skipped.
                file.seek(number(4), 1)
                continue
            descriptor = number(1)
            single = descriptor >> 5 & 1
            file.seek(1 - single + (0, 1, 2, 4)[descriptor & 3] + (single, 2, 4, 8)[descriptor >> 6], 1)
            last = False
            while not last and file.tell() < size:
                block = number(3)
                last, repeated = block & 1, block >> 1 & 3 == 1
                file.seek(1 if repeated else block >> 3, 1)
            file.seek(4 * (descriptor >> 2 & 1), 1)
            if not last:
                return False
        return file.tell() == size


def _adds_up(path: Path) -> bool:
    """Whether what gzip unpacks has the checksum that it was packed with, at which DuckDB does not look."""
    try:
        with gzip.open(path) as content:
            while content.read(1 << 20):
                pass
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return False
    return True


def _bad_line(path: Path, text_column: str) -> str | None:
    """What is wrong with the first line that is: DuckDB's own line numbers leave out blank lines."""
    with contextlib.closing(_lines(path)) as lines:
        try:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                if len(line) > LINE_BYTES:
                    return _too_long(path, number)
                try:
                    record = json.loads(line, object_pairs_hook=_each_once)
                    json.dumps(record, ensure_ascii=False).encode()
                except RecursionError:
                    return f"{path}, line {number}: nested too deep; mend or remove the line"
                except ValueError as error:
                    reason = "not UTF-8" if isinstance(error, UnicodeError) else getattr(error, "msg", str(error))
                    return _not_json(path, number, reason)
                if isinstance(record, dict) and not isinstance(record.get(text_column, ""), str):
                    return f"{path}, line {number}: no text in column {text_column!r}; mend or remove the line"
                if not isinstance(record, dict) or text_column not in record:
                    has = ", ".join(map(repr, record)) if isinstance(record, dict) else f"a {type(record).__name__}"
                    has = has or "nothing"
                    return (
                        f"{path}, line {number}: no column {text_column!r} (it has {has}); "
                        "set data.text_column or mend the line"
                    )
        except (EOFError, gzip.BadGzipFile, zlib.error):
            return _damaged(path)
        except duckdb.Error as error:
            return _bad_line_of_duckdb(path, str(error))
    return None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of those keys; ValueError for a key that comes again, which JSON leaves open and DuckDB refuses."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} comes twice")
        found[key] = value
    return found


def _damaged(path: Path) -> str:
    return f"{path}: damaged or cut short; copy or make it again"


def _too_long(path: Path, number: int) -> str:
    return f"{path}, line {number}: longer than {LINE_BYTES >> 20} MiB; divide its text among several"


def _not_json(path: Path, number: int, reason: str) -> str:
    return f"{path}, line {number}: not JSON ({reason}); mend or remove the line"


def _lines(path: Path) -> Iterator[bytes | str]:
    """The lines of a JSON-lines file, blank ones too."""
    if not path.name.endswith(".zst"):
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as lines:
            yield from lines
        return
    # A table of one column whose fields nothing divides, quotes or escapes; its lines may end in LF or in CR LF.
    # With parallel=false DuckDB would hold the whole file; without, it names no line that is longer than the buffer.
    options = (
        "columns={'line': 'VARCHAR'}, delim='\x1f\x1e\x1d\x1c', quote='', escape='', comment='', header=false, "
        "auto_detect=false, strict_mode=false, hive_partitioning=false, "
        f"max_line_size={LINE_BYTES}, buffer_size={4 * LINE_BYTES}"
    )
    with duckdb.connect(config={"threads": 1}) as connection:
        cursor = connection.execute(f"SELECT line FROM read_csv(?, {options})", [glob.escape(str(path))])
        while rows := cursor.fetchmany(256):
            # A blank line is a field without a value.
            yield from (f"{line or ''}\n" for (line,) in rows)


def _bad_line_of_duckdb(path: Path, error: str) -> str | None:
    """What is wrong with a line that DuckDB could not give as text."""
    if not (match := re.search(r"CSV Error on Line: (\d+)", error)):
        return None
    number = int(match[1])
    return _not_json(path, number, "not UTF-8") if "Invalid unicode" in error else _too_long(path, number)
