"""The version, apart from the package so that a build can read it without importing jax."""

import functools
import shutil
import subprocess
from pathlib import Path

__version__ = "0.1.0"


@functools.cache
def code_version() -> dict[str, str]:
    """What computes here: this package's version, its commit if it runs from a checkout, jax, Orbax."""
    import jax
    import orbax.checkpoint as ocp

    version = {"vishwamai_eqx": __version__, "jax": jax.__version__, "orbax": ocp.__version__}
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        version["commit"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return version
