"""A study's cases by name, each measured and kept in a JSON file as soon as it is there."""

import datetime
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vishwamai_eqx.version import code_version

Case = TypeVar("Case")


def study(cases: Mapping[str, Case], measure: Callable[[Case], dict[str, Any]], results: Path, names: list[str]) -> int:
    """Measure the cases of those names, or all, and add what is found to `results` with code and date; an exit code."""
    unknown = [name for name in names if name not in cases]
    if unknown:
        print(f"{unknown[0]!r} is no case: they are {', '.join(cases)}", file=sys.stderr)
        return 2
    known = json.loads(results.read_text()) if results.exists() else {}
    for name in names or cases:
        known[name] = measure(cases[name]) | {"code": code_version(), "date": datetime.date.today().isoformat()}
        results.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{name}: {json.dumps(known[name])}", flush=True)
    return 0
