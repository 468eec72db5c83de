"""A file of prompts, and the file of what is written to them: one JSON object a line, which a second run goes on with.

    {"prompt": "The capital of France is"}
    {"line": 1, "prompt": "The capital of France is", "samples": [{"text": " Paris.", "tokens": [...]}]}

What comes out is in the order in which it is done; `line` says to which prompt it belongs. Whatever ends a run, each
line is whole, or is cut off when the next run begins.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Of each line of what is written.
BEGINNING = b'{"line": '


class Prompt(NamedTuple):
    """A line of a file of prompts."""

    line: int
    text: str


def read(path: Path) -> tuple[list[Prompt], list[str]]:
    """The prompts of a file, and a sentence for each line that has none; blank lines are left out.

    **Raises** ValueError for a file that cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"prompts={path} cannot be read ({error.strerror}); give a file of JSON lines.") from None
    prompts, broken = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            prompt = found["prompt"]
            prompt.encode()
        except (ValueError, TypeError, KeyError, AttributeError):
            said = line[:40].decode(errors="replace")
            broken.append(f'{path}:{number}: {said!r} is no JSON object with a text as "prompt"; put it right.')
        else:
            prompts.append(Prompt(number, prompt))
    return prompts, broken


class Out:
    """What is written to prompts, appended to a file line by line.

    **Raises** ValueError where the file cannot be written, or holds what was written to other prompts.
    """

    def __init__(self, path: Path, prompts: list[Prompt]):
        self.path = path
        try:
            self.file = path.open("a+b", buffering=0)
        except OSError as error:
            raise ValueError(f"out={path} cannot be written ({error.strerror}); give another file.") from None
        try:
            self.done = self._whole({(str(prompt.line), prompt.text) for prompt in prompts})
        except ValueError:
            self.file.close()
            raise

    def _whole(self, prompts: set[tuple[str, str]]) -> set[int]:
        """The lines that are done; half a line at the end is cut off."""
        done: set[int] = set()
        end = 0
        self.file.seek(0)
        lines = self.file.read().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                found = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                found = None
            if found is None:
                if number < len(lines) or not line.startswith(BEGINNING[: len(line)]):
                    raise ValueError(
                        f"out={self.path}: {line[:40].decode(errors='replace')!r} is nothing that was written here; "
                        "give another file."
                    )
                break
            if not isinstance(found, dict) or (str(found.get("line")), str(found.get("prompt"))) not in prompts:
                raise ValueError(
                    f"out={self.path} has what was written to other prompts; give another file, or the prompts that "
                    "it was begun with."
                )
            done.add(found["line"])
            end += len(line)
        self.file.truncate(end)
        return done

    def add(self, prompt: Prompt, samples: list[dict[str, Any]]) -> None:
        """Append a line. **Raises** OSError where there is no room, and leaves the file as it was."""
        line = json.dumps({"line": prompt.line, "prompt": prompt.text, "samples": samples}, ensure_ascii=False)
        end = self.file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(line.encode(errors="replace") + b"\n")
            while rest:
                # Of a disk that becomes full, the part for which there was room is written, without an error.
                rest = rest[self.file.write(rest) :]
        except OSError:
            self.file.truncate(end)
            raise
        self.done.add(prompt.line)

    def __enter__(self) -> "Out":
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()


def left(prompts: list[Prompt], out: Out) -> Iterator[Prompt]:
    """The prompts to which nothing is written yet."""
    return (prompt for prompt in prompts if prompt.line not in out.done)
