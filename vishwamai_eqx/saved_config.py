"""A run's configuration as its folder holds it: in `config.json`, and in each checkpoint under that one's checksum.

The checkpoint decides: its numbers are of that configuration and of no other. `config.json`, which anything may happen
to, is made again from it when it is lost or says something else.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from vishwamai_eqx import checkpoint, manifest
from vishwamai_eqx.config import Config, from_dict, to_dict

NAME = "config.json"
# Settings that may differ when a run is resumed: they change what is looked at, not what is computed. With those of
# `guard` a run that stopped for too many skipped steps gets past them. A teacher may have moved: checkpoints know it by
# what it knows.
FREE = (
    "run_dir",
    "teacher",
    "mesh",
    "offload",
    "dry_run",
    "topology",
    "plan",
    "json",
    "replay",
    "checkpoint",
    "eval",
    "guard",
    "processes",
)


def read(run_dir: Path) -> Config | None:
    """The configuration that a run was started with; None if there is no run.

    It is that of the newest checkpoint, with what may differ as `config.json` has it. **Raises** ValueError where that
    is none of this version, and where there are checkpoints and no configuration can be read.
    """
    folder = run_dir / "checkpoints"
    newest = checkpoint.newest(folder)
    if newest is None or not newest[1].get("configuration"):
        try:
            config = _read_file(run_dir / NAME)
        except ValueError as error:
            raise ValueError(f"{error}; use another --run-dir.") from None
        if config is None and checkpoint.steps(folder):
            raise ValueError(
                f"{run_dir} has checkpoints and no configuration: {NAME} is lost and their manifests cannot be read; "
                f"put {NAME} back, or take another --run-dir."
            )
        return config
    where, about = newest
    try:
        config = from_dict(about["configuration"])
    except ValueError as error:
        raise ValueError(f"{where / manifest.NAME}: {error}; use another --run-dir.") from None
    with contextlib.suppress(ValueError):
        if (file := _read_file(run_dir / NAME)) is not None:
            return dataclasses.replace(config, **{name: getattr(file, name) for name in FREE})
    return config


def write(config: Config) -> list[str]:
    """Save the configuration in its run directory; a sentence for each thing that was there and not the run's.

    A file with such things is put aside. **Raises** ValueError where the directory cannot be written.
    """
    assert config.run_dir is not None
    path, found = config.run_dir / NAME, []
    with _writing(config.run_dir):
        try:
            if (file := _read_file(path)) is not None:
                found = [
                    f"{path} has {name}={there!r}; the run was saved with {here!r} and goes on with it"
                    for name, there, here in differences(to_dict(file), to_dict(config))
                ]
            elif checkpoint.steps(config.run_dir / "checkpoints"):
                found = [f"{path} is lost; it is made again from the newest checkpoint"]
        except ValueError as error:
            found = [f"{error}; it is made again from the newest checkpoint"]
        fresh = path.with_name(f"{NAME}.tmp")
        fresh.write_text(json.dumps(to_dict(config), indent=2) + "\n")
        if found and path.exists():
            aside = manifest.put_aside(path)
            found.append(f"what {path} was is now {aside.name}")
        fresh.replace(path)
    return found


def make_run_dir(run_dir: Path) -> None:
    """Make the folder of a new run, before anything is computed for it; ValueError where it cannot be written."""
    with _writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=run_dir).close()


def differences(saved: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, saved value and wanted value of each setting of a run that cannot change under it."""
    for name, value in saved.items():
        if not prefix and name in FREE:
            continue
        if isinstance(value, dict) and isinstance(wanted[name], dict):
            yield from differences(value, wanted[name], f"{prefix}{name}.")
        elif value != wanted[name]:
            yield f"{prefix}{name}", value, wanted[name]


def _read_file(path: Path) -> Config | None:
    """The configuration in a file; None if it is not there, ValueError if it holds none."""
    if not path.exists():
        return None
    try:
        return from_dict(json.loads(path.read_text()))
    except RecursionError:
        raise ValueError(f"{path}: not a configuration of this version") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None


@contextlib.contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"run_dir={str(run_dir)!r} cannot be written: {error}; take another --run-dir.") from None
