"""In a new process: quiet on a machine without a TPU, and a sentence where another package is called kernels."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(code: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "XLA", "TPU"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**clean, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_quiet_on_cpu_with_libtpu_installed():
    found = python("import vishwamai_eqx, jax; print(jax.default_backend())")
    assert (found.stdout.strip(), found.stderr) == ("cpu", "")


def test_another_package_called_kernels(tmp_path):
    # As other such packages do, it has a module of a name that ours has too.
    (tmp_path / "kernels" / "flash_attention").mkdir(parents=True)
    (tmp_path / "kernels" / "__init__.py").touch()
    found = python("import vishwamai_eqx", tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert found.returncode == 1
    assert "`kernels` is another distribution's package of that name" in found.stderr
