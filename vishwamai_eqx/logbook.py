"""What a run did, in DuckDB, readable while it goes on.

The truth is `RUN/metrics/*.jsonl`: append-only segments, one JSON object a line, flushed as they come, so that a killed
run loses no more than the rows of its last moment and at worst tears its last line, which readers skip.
`RUN/metrics.duckdb` holds views over the segments and nothing else. The run never keeps it open, because DuckDB refuses
every other process a file that one has open for writing; any client may query it at any time, from any directory.

A segment is one attempt: it begins when a process starts or goes back to a checkpoint, and its name says from which
step (`attempt-000002-from-400.jsonl`). Attempts overlap, since a run that died at step 470 does steps 401 to 470 again.
The views show one history: a row is hidden once a later attempt has resumed before its step, and where two attempts
logged one step the later one stands. `events`, `spans` and `attempts` are the record of what happened and hide nothing;
`goodput` is what the run's time went to over all attempts.
Step s is the update that made `state.step` s, so a checkpoint of step s holds the work of rows 1 to s.
"""

import glob
import itertools
import json
import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat, SupportsInt, no_type_check

import duckdb

_logger = logging.getLogger(__name__)

# One schema for all segments: read_json reads the fields a view asks for and gives NULL for those a row lacks.
_FIELDS = {
    **dict.fromkeys(("attempt", "n", "step", "tokens", "bytes", "resumed_at"), "BIGINT"),
    **dict.fromkeys(("time", "loss", "grad_norm", "learning_rate", "tokens_per_second", "bits_per_byte"), "DOUBLE"),
    **dict.fromkeys(("data_seconds", "step_seconds", "seconds"), "DOUBLE"),
    **dict.fromkeys(("table", "batch_hash", "kind", "message", "text", "name"), "VARCHAR"),
    **dict.fromkeys(("configuration", "environment"), "JSON"),
    "load": "DOUBLE[][]",
    "more": "MAP(VARCHAR, DOUBLE)",
}
_TIME = "make_timestamp((time * 1e6)::BIGINT) AS time"
_SEGMENT = re.compile(r"attempt-(\d+)(?:-from-(\d+))?\.jsonl")


def _views(run_dir: Path) -> dict[str, str]:
    """SQL of each view, with the absolute path of the segments in it.

    A relative one would follow the client about, and one made of the database's own path DuckDB refuses: `read_json`
    takes literals alone.
    """
    folder = glob.escape(str(run_dir.resolve() / "metrics"))
    pattern = f"{folder}/attempt-*.jsonl".replace("'", "''")
    columns = ", ".join(f"'{name}': '{kind}'" for name, kind in _FIELDS.items())

    def rows(table: str) -> str:
        source = f"read_json('{pattern}', format = 'newline_delimited', ignore_errors = true, columns = {{{columns}}})"
        return f"(SELECT * FROM {source} WHERE \"table\" = '{table}')"

    # What a later attempt resumed before is history that has been taken back.
    history = f"""(SELECT attempt, min(resumed_at) OVER later AS upto
        FROM (SELECT regexp_extract(file, 'attempt-(\\d+)', 1)::BIGINT AS attempt,
                     nullif(regexp_extract(file, '-from-(\\d+)', 1), '')::BIGINT AS resumed_at FROM glob('{pattern}'))
        WINDOW later AS (ORDER BY attempt ROWS BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING))"""

    def standing(table: str, *, ties: str) -> str:
        """The rows that still count; `ties` is row_number for one row a step, rank for all of the last attempt's."""
        order = "attempt DESC, n DESC" if ties == "row_number" else "attempt DESC"
        return f"""(SELECT * FROM {rows(table)} JOIN {history} USING (attempt) WHERE upto IS NULL OR step <= upto
            QUALIFY {ties}() OVER (PARTITION BY step ORDER BY {order}) = 1)"""

    spans = f"SELECT time, step, name, seconds, attempt, n FROM {rows('spans')}"
    for name in ("data", "step"):
        spans += f""" UNION ALL SELECT time, step, '{name}', {name}_seconds, attempt, n FROM {rows("steps")}
            WHERE {name}_seconds IS NOT NULL"""

    return {
        "steps": f"""SELECT step, loss, grad_norm, learning_rate, tokens, tokens_per_second, batch_hash, data_seconds,
            step_seconds, {_TIME}, attempt, more FROM {standing("steps", ties="row_number")} ORDER BY step""",
        "evals": f"""SELECT step, loss, bits_per_byte, {_TIME}, attempt, more
            FROM {standing("evals", ties="row_number")} ORDER BY step""",
        "events": f"SELECT {_TIME}, step, kind, message, attempt FROM {rows('events')} ORDER BY attempt, n",
        "samples": f"SELECT step, text, {_TIME}, attempt FROM {standing('samples', ties='rank')} ORDER BY step, n",
        "experts": f"""SELECT step, layer, generate_subscripts(loads, 1) - 1 AS expert, unnest(loads) AS load
            FROM (SELECT step, generate_subscripts(load, 1) - 1 AS layer, unnest(load) AS loads
                  FROM {standing("experts", ties="row_number")})
            ORDER BY step, layer, expert""",
        "memory": f"""SELECT step, name, bytes, {_TIME}, attempt FROM {standing("memory", ties="rank")}
            ORDER BY step, name""",
        "spans": f"SELECT {_TIME}, step, name, seconds, attempt FROM ({spans}) ORDER BY attempt, n",
        # What was done at steps that a later attempt took back was done in vain.
        "goodput": f"""SELECT name, seconds, seconds / sum(seconds) OVER () AS share
            FROM (SELECT CASE WHEN step > upto THEN 'repeated' ELSE name END AS name, sum(seconds) AS seconds
                  FROM ({spans}) JOIN {history} USING (attempt) GROUP BY 1)
            ORDER BY seconds DESC""",
        "attempts": f"""SELECT attempt, {_TIME}, resumed_at, configuration, environment FROM {rows("attempts")}
            ORDER BY attempt""",
    }


# A checked annotation holds DuckDB's class beyond the interpreter's end, and DuckDB reports that as a leak.
@no_type_check
def connect(run_dir: str | Path) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB connection with the views of a run, wherever its folder lies now, for notebooks and tests.

    Raises ValueError where no run has logged anything.
    """
    run_dir = Path(run_dir)
    if not any((run_dir / "metrics").glob("attempt-*.jsonl")):
        raise ValueError(f"run_dir={str(run_dir)!r} must be the folder of a run, with metrics/attempt-*.jsonl in it")
    connection = duckdb.connect()
    for name, query in _views(run_dir).items():
        connection.execute(f"CREATE VIEW {name} AS {query}")
    return connection


def write_views(run_dir: str | Path) -> None:
    """Make `RUN/metrics.duckdb` anew; every `Logbook` does, and whoever moves a run's folder may.

    It is built beside and renamed over the old one, which takes no lock: clients that have the old one open keep it.
    """
    run_dir = Path(run_dir)
    fresh = run_dir / f".metrics-{os.getpid()}.duckdb"
    fresh.unlink(missing_ok=True)
    with duckdb.connect() as connection:
        # The storage version that every DuckDB from 1.0 on reads; 2.0's own is closed to the 1.x clients.
        connection.execute(f"ATTACH '{str(fresh).replace(chr(39), chr(39) * 2)}' AS book (STORAGE_VERSION 'v1.0.0')")
        for name, query in _views(run_dir).items():
            connection.execute(f"CREATE VIEW book.{name} AS {query}")
    os.replace(fresh, run_dir / "metrics.duckdb")


class Logbook:
    """The writer of a run's metrics: a method for each table, each a hand-over to a thread and microseconds long.

    Numbers may be device arrays: the thread waits for them, not the loop. A disk that refuses a row keeps the run
    going; rows wait in memory and are tried again with the next ones. Of several processes only process 0 writes.

    **Arguments**

    - `run_dir`: the run's folder, made if it is not there.
    - `resumed_at`: the step of the restored state, 0 for a new run. If it is not known yet, call `resume` before the
      first step: opening a checkpoint may have things to log.
    - `configuration`: JSON-ready settings, kept with the attempt.
    - `environment`: versions and devices, likewise.
    """

    def __init__(
        self,
        run_dir: str | Path,
        resumed_at: int | None = None,
        *,
        configuration: Mapping[str, Any] | None = None,
        environment: Mapping[str, Any] | None = None,
        process: int = 0,
    ):
        self.run_dir = Path(run_dir)
        self.process = process
        self._about = {"configuration": configuration or {}, "environment": environment or {}}
        self._queue: queue.SimpleQueue[dict[str, Any] | threading.Event | None] = queue.SimpleQueue()
        self._attempt = 0
        self._count = itertools.count(1)
        self._file: int | None = None
        self._turn = threading.Lock()
        self._unwritten = b""
        self._torn = self._refused = False
        if process != 0:
            return
        self._begin(resumed_at)
        write_views(self.run_dir)
        self._thread = threading.Thread(target=self._write, name="logbook", daemon=True)
        self._thread.start()

    def resume(self, step: int) -> None:
        """Begin a new attempt at `step`: what was logged of later steps is hidden from here on."""
        if self.process == 0:
            self.flush()
            self._begin(step)

    def step(
        self,
        *,
        step: int,
        loss: SupportsFloat,
        grad_norm: SupportsFloat | None = None,
        learning_rate: SupportsFloat | None = None,
        tokens: SupportsInt | None = None,
        tokens_per_second: SupportsFloat | None = None,
        batch_hash: object = None,
        data_seconds: SupportsFloat | None = None,
        step_seconds: SupportsFloat | None = None,
        **more: SupportsFloat,
    ) -> None:
        """Log the step that made `state.step` `step`; further numbers go to the column `more`, `more['mfu']` in SQL.

        `tokens` are those that the step learned from, `learning_rate` is the one it used, and `batch_hash` is
        written as the string it makes of itself. `data_seconds` is how long the step waited for its batch and
        `step_seconds` how long it took besides; they are spans too.
        """
        self._row(
            "steps",
            step=step,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            tokens=tokens,
            tokens_per_second=tokens_per_second,
            batch_hash=batch_hash,
            data_seconds=data_seconds,
            step_seconds=step_seconds,
            more=more,
        )

    def eval(self, *, step: int, loss: SupportsFloat, bits_per_byte: SupportsFloat, **more: SupportsFloat) -> None:
        """Log an evaluation on held-out text; `loss` is in nats a token."""
        self._row("evals", step=step, loss=loss, bits_per_byte=bits_per_byte, more=more)

    def event(self, kind: str, message: str, *, step: int | None = None) -> None:
        """Log something that a person may want to know later: `kind` is one word to filter by."""
        self._row("events", step=step, kind=kind, message=message)

    def sample(self, step: int, text: str) -> None:
        """Log a text that the model wrote after `step`; several of one step are all kept."""
        self._row("samples", step=step, text=text)

    def experts(self, step: int, load: Any) -> None:
        """Log the share of tokens each expert took: `load` is an array or nested list [layers, experts]."""
        self._row("experts", step=step, load=load)

    def memory(self, step: int, name: str, size: int) -> None:
        """Log bytes in use: `name` is a device, or host."""
        self._row("memory", step=step, name=name, bytes=size)

    def span(self, name: str, seconds: SupportsFloat, *, step: int | None = None) -> None:
        """Log wall time spent on something other than a step: start, compile, eval, save; `goodput` sums them up."""
        self._row("spans", step=step, name=name, seconds=seconds)

    def flush(self) -> None:
        """Return once every row logged so far is in its file."""
        if self.process == 0:
            written = threading.Event()
            self._queue.put(written)
            written.wait()

    def close(self) -> None:
        """Write what is left and close the segment."""
        if self.process == 0 and self._file is not None:
            self._queue.put(None)
            self._thread.join()
            os.close(self._file)
            self._file = None

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, resumed_at: int | None) -> None:
        folder = self.run_dir / "metrics"
        folder.mkdir(parents=True, exist_ok=True)
        known = [int(match[1]) for path in folder.iterdir() if (match := _SEGMENT.fullmatch(path.name))]
        self._attempt = max(known, default=0) + 1
        name = f"attempt-{self._attempt:06d}" + ("" if resumed_at is None else f"-from-{resumed_at}") + ".jsonl"
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        # Other threads log too: a checkpoint's does.
        with self._turn:
            if self._file is not None:
                os.close(self._file)
            self._file, self._torn = file, False
        self._row("attempts", resumed_at=resumed_at, **self._about)

    def _row(self, table: str, **values: Any) -> None:
        if self.process != 0:
            return
        about = {"table": table, "attempt": self._attempt, "n": next(self._count), "time": time.time()}
        self._queue.put({**about, **values})

    def _write(self) -> None:
        """The thread: everything that waits, in one write."""
        while True:
            waiting: list[dict[str, Any] | threading.Event | None] = [self._queue.get()]
            while not self._queue.empty():
                waiting.append(self._queue.get())
            lines = b"".join(_encode(item) for item in waiting if isinstance(item, dict))
            with self._turn:
                self._append(lines)
            for item in waiting:
                if isinstance(item, threading.Event):
                    item.set()
            if waiting[-1] is None:
                return

    def _append(self, lines: bytes) -> None:
        assert self._file is not None
        self._unwritten += lines
        while self._unwritten:
            # A line that was cut off ends here, so that the next one is whole.
            data = b"\n" + self._unwritten if self._torn else self._unwritten
            try:
                count = os.write(self._file, data)
            except OSError as error:
                if not self._refused:
                    _logger.error("metrics cannot be written to %s: %s; rows wait in memory", self.run_dir, error)
                self._refused = True
                return
            rest = data[count:]
            # A short write is about to be an error: begin again with the line it tore.
            start = data.rfind(b"\n", 0, count) + 1
            self._torn = bool(rest)
            self._unwritten = data[start:] if rest else b""
        self._refused = False


def _encode(row: dict[str, Any]) -> bytes:
    """A row as a line; of one that cannot be read, an array since donated for one, only the log hears."""
    try:
        return _line(row)
    except Exception:
        _logger.exception("a row of %s at step %s is lost", row["table"], row.get("step"))
        return b""


def _line(row: dict[str, Any]) -> bytes:
    row = {name: value for name, value in row.items() if value is not None}
    try:
        text = json.dumps(row, default=_plain, allow_nan=False)
    except ValueError:
        # JSON has no word for what is not finite; DuckDB reads these strings as numbers.
        text = json.dumps(_finite(json.loads(json.dumps(row, default=_plain))))
    return text.encode() + b"\n"


def _plain(value: Any) -> Any:
    """An array as nested lists, a scalar of one as a number; this is where the thread waits for a device."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
