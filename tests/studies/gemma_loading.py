"""Time and memory of loading a Gemma folder of 2 GB, beside reading its files: `python -m tests.studies.gemma_loading`.

The folder is random, in bf16, in three files. Peak memory is that of a process of its own; pages of the files that the
kernel keeps mapped are counted apart from what the process holds, because it gives them back when others want them.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from vishwamai_eqx import gemma, gemma_config, huggingface_model
from vishwamai_eqx.gemma_config import GemmaConfig
from vishwamai_eqx.version import code_version

CONFIG = GemmaConfig("gemma", 32_000, 2048, 16_384, 8, 8, 8, 256)


def make(folder: Path, files: int = 3) -> int:
    """The folder; its bytes of weights."""
    abstract = jax.eval_shape(lambda: gemma.Decoder(CONFIG, key=jax.random.key(0)))
    sources = gemma.names(abstract)
    leaves, structure = jax.tree.flatten(abstract)
    shapes = {}
    for leaf, origin in zip(leaves, structure.flatten_up_to(sources), strict=True):
        shape = leaf.shape[1:] if origin.stacked else leaf.shape
        shapes |= dict.fromkeys(origin.names, shape[::-1] if origin.transposed else shape)
    names, rng = sorted(shapes), np.random.default_rng(0)
    placed, total = {}, 0
    for number in range(files):
        mine = names[number::files]
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        tensors = {
            name: rng.integers(0x3C00, 0x3D00, shapes[name], dtype=np.uint16).view(ml_dtypes.bfloat16) for name in mine
        }
        save_file(tensors, folder / file)
        placed |= dict.fromkeys(mine, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / huggingface_model.INDEX).write_text(json.dumps({"weight_map": placed}))
    (folder / "config.json").write_text(json.dumps(gemma_config.describe(CONFIG, "bfloat16")))
    return total


def status(name: str) -> int:
    """Bytes of this process by the kernel's account."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{name} is not in /proc/self/status")


def measure(folder: Path, how: str) -> dict[str, float]:
    """Seconds and peak memory of reading the files, of keeping what is read, or of loading the model."""
    before = status("RssAnon")
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            peak[0] = max(peak[0], status("RssAnon") - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    if how == "read":
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb", buffering=0) as handle:
                buffer = bytearray(1 << 24)
                while handle.readinto(buffer):
                    pass
    elif how == "keep":
        # As little as any loader can do: bytes in memory that was not this process's before.
        kept = [np.fromfile(file, np.uint8) for file in sorted(folder.glob("*.safetensors"))]
        assert sum(each.nbytes for each in kept) > 1e9
    else:
        jax.block_until_ready(gemma.load(folder, ml_dtypes.bfloat16))
    seconds = time.perf_counter() - began
    over.set()
    watcher.join()
    return {"seconds": round(seconds, 2), "peak_bytes": peak[0], "peak_with_mapped_files": status("VmHWM")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", nargs=2, metavar=("FOLDER", "HOW"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.of:
        print(json.dumps(measure(Path(arguments.of[0]), arguments.of[1])))
        return
    with tempfile.TemporaryDirectory() as name:
        total, results = make(Path(name)), {}
        slices = jax.eval_shape(lambda: gemma.Decoder(CONFIG, key=jax.random.key(0)))
        for how in ("read", "keep", "load") * 3:
            command = [sys.executable, "-m", "tests.studies.gemma_loading", "--of", name, how]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout)
            # Of several the fastest: how long memory takes that no process had before is the machine's affair.
            results[how] = min(found, results.get(how, found), key=lambda result: result["seconds"])
    largest = 2 * max(leaf.size for leaf in jax.tree.leaves(slices))
    results |= {"folder_bytes": total, "largest_array_bytes": largest}
    results |= {"code": code_version(), "date": datetime.date.today().isoformat()}
    results["peak_over_share_and_slice"] = round(results["load"]["peak_bytes"] / (1.2 * total + largest), 3)
    text = json.dumps(results, indent=2)
    Path(__file__).with_suffix(".json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
