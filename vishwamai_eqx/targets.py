"""What a teacher said of a run's batches, computed once by `draw_targets` and read in its place.

A file holds a batch: pieces drawn from the teacher's target (`draws`), the likeliest one, and the entropy. The folder
says of which teacher, tokenizer and data it is, and is for no other.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vishwamai_eqx.config import Config
from vishwamai_eqx.data import Dataset, DrawnBatch

# Of whom a folder is.
HEADER = "targets.json"


@dataclass(frozen=True)
class Targets:
    """The batches of a dataset with what the teacher said of them."""

    student: Dataset
    folder: Path
    draws: int
    teacher_fingerprint: str
    kind = DrawnBatch

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of all that a run learns from."""
        return {**self.student.fingerprints, "teacher": self.teacher_fingerprint}

    @property
    def batch_size(self) -> int:
        return self.student.batch_size

    @property
    def seq_len(self) -> int:
        return self.student.seq_len

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each field of a batch."""
        return (self.seq_len,) * 6 + (self.draws * self.seq_len,)

    def batch(self, n: int, rows: slice = slice(None)) -> DrawnBatch:
        """Batch n of the run, or those of its rows that a process needs."""
        likeliest, entropy, *drawn = np.load(path(self.folder, n), mmap_mode="r")[:, rows]
        drawn = np.concatenate(drawn, axis=-1)
        return DrawnBatch(*self.student.batch(n, rows), np.asarray(likeliest), np.asarray(entropy), drawn)


def path(folder: Path, n: int) -> Path:
    """Where batch n is."""
    return folder / f"{n:08}.npy"


def header(config: Config, fingerprints: dict[str, str]) -> dict[str, Any]:
    """What a folder is of: the teacher's, the tokenizer's and the data's fingerprints, and how much was drawn."""
    return {**fingerprints, "draws": config.distill.draws}


def check(config: Config, fingerprints: dict[str, str]) -> None:
    """Refuse targets of another teacher, tokenizer or data, or too few: ValueError with the way to make them."""
    if config.distill.targets is None:
        return
    folder, wanted = config.distill.targets, header(config, fingerprints)
    make = "make them with python -m vishwamai_eqx.draw_targets and the run's settings"
    try:
        found = json.loads((folder / HEADER).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"distill.targets={str(folder)!r} must hold a teacher's targets ({error}); {make}.") from None
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"distill.targets={str(folder)!r} must be of this run's {name}, {value}, and is of {found.get(name)}; "
                f"{make}, in another folder."
            )
    first = next((n for n in range(config.optim.steps) if not path(folder, n).exists()), None)
    if first is not None:
        raise ValueError(
            f"distill.targets={str(folder)!r} must hold the run's {config.optim.steps} batches and has {first}; {make}."
        )
