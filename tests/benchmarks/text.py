"""How fast text becomes rows, and in how much memory, on made-up prose: one JSON object.

    python -m tests.benchmarks.text 100

`cold` indexes, tokenizes and packs; `warm` does so again from the cache, in a new process. `anonymous_mb` is memory
that is not a mapped file, at its peak, beyond what the imports took.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

WORDS = 30_000


def write_corpus(path: Path, megabytes: int) -> None:
    """Records of a median of 250 words by Zipf's law, as JSON lines."""
    rng = np.random.default_rng(megabytes)
    letters = list("etaoinshrdlucmfwypvbgkjqxz")
    vocabulary = np.array(["".join(rng.choice(letters, int(rng.integers(2, 10)))) for _ in range(WORDS)])
    with path.open("w") as file:
        while file.tell() < megabytes * 10**6:
            # A fifth of what Zipf's law draws is beyond the vocabulary, and goes to all of its words alike.
            chosen = vocabulary[(rng.zipf(1.15, int(rng.lognormal(5.5, 0.8)) + 5) - 1) % WORDS]
            lines = [" ".join(chosen[at : at + 14]) for at in range(0, len(chosen), 14)]
            file.write(json.dumps({"text": "\n".join(lines)}) + "\n")


def measure(folder: Path) -> dict[str, float]:
    """Index, tokenize and pack what is in a folder, with a tokenizer that is there."""
    from vishwamai_eqx import data
    from vishwamai_eqx.config import DataConfig
    from vishwamai_eqx.tokenizer import VishwamAITokenizer

    def anonymous() -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().split("\n") if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds = [time.perf_counter()]
    corpus = data.load_documents(DataConfig(files=(f"{folder}/*.jsonl",)), cache_dir=folder / "cache")
    seconds.append(time.perf_counter())
    tokenizer = VishwamAITokenizer(folder / "tokenizer")
    dataset = data.prepare(corpus, tokenizer, seq_len=1024, batch_size=16, seed=0, cache_dir=folder / "cache")
    dataset.batch(0)
    seconds.append(time.perf_counter())
    done.set()
    watcher.join()
    (rows,) = dataset.train_rows
    return {
        "megabytes": float(corpus.sizes.sum() / 1e6),
        "documents": len(corpus.sizes),
        "index_seconds": seconds[1] - seconds[0],
        "tokenize_seconds": seconds[2] - seconds[1],
        "tokenize_megabytes_per_second": float(corpus.sizes.sum() / 1e6 / (seconds[2] - seconds[1])),
        "cpu_seconds": time.process_time(),
        "padding": float(1 - rows.length.sum() / (len(rows) * 1024)),
        "anonymous_mb": (peak[0] - before) / 1e6,
    }


def main(megabytes: int) -> dict[str, dict[str, float]]:
    """The figures of a cold and of a warm start."""
    from vishwamai_eqx.tokenizer import VishwamAITokenizer

    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus.jsonl")
        write_corpus(corpus, megabytes)
        with corpus.open() as lines:
            texts = (json.loads(line)["text"] for line, _ in zip(lines, range(5000), strict=False))
            VishwamAITokenizer.train(texts, 4096, Path(folder, "tokenizer"))
        command = [sys.executable, "-m", "tests.benchmarks.text", "--measure", folder]
        runs = [subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    return {name: json.loads(run.stdout) for name, run in zip(("cold", "warm"), runs, strict=True)}


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(Path(sys.argv[2]))))
    else:
        print(json.dumps(main(int(sys.argv[1])), indent=1))
