"""A run's model as a folder of its own: `python -m vishwamai_eqx.export RUN DIR`.

DIR gets the weights as safetensors, the tokenizer, config.json and a model
card; `vishwamai_eqx.load(DIR)` and `generate.py --run-dir DIR` read it as they
read the run. A Gemma that was fine-tuned becomes a Gemma folder, for
`vishwamai_eqx.gemma.load(DIR)`, `generate.py --model DIR` and `transformers`.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vishwamai_eqx import gemma, huggingface_model, logbook, manifest, run
from vishwamai_eqx.config import to_dict
from vishwamai_eqx.parameters import count
from vishwamai_eqx.version import __version__

CARD = """# {name}

{kind} with VishwamAI {version}.

| | |
|---|---|
| parameters | {parameters:,} |
| shape | {shape} |
| steps | {step:,} of {batch} rows of {seq} tokens |
| data, by hash | `{fingerprint}` |
| held-out bits per byte | {bits} |

```python
{usage}
```
"""
USAGE = """import vishwamai_eqx

model, tokenizer, config = vishwamai_eqx.load("{name}")"""
USAGE_OF_GEMMA = """from vishwamai_eqx import gemma

model, tokenizer = gemma.load("{name}"), gemma.tokenizer("{name}")"""


@dataclass(frozen=True)
class Settings:
    """What `python -m vishwamai_eqx.export` takes."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run directory whose newest checkpoint is written."""
    directory: Annotated[Path, tyro.conf.Positional]
    """The folder to write, which must be empty or new."""


def export(run_dir: Path, directory: Path) -> None:
    """Write the newest good checkpoint's model, as trained, in f32.

    **Raises** ValueError where `run_dir` is no run, and where `directory` holds something already.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"directory={str(directory)!r} must be empty or new: nothing is overwritten; take another.")
    config = run.configuration(run_dir)
    tokenizer = run.tokenizer_of(run_dir, config)
    model, step = run.trained(run_dir, config, tokenizer)
    about = manifest.read(run_dir / "checkpoints" / str(step))
    bits = logbook.connect(run_dir).execute(
        "SELECT bits_per_byte FROM evals WHERE step <= ? ORDER BY step DESC LIMIT 1", [step]
    )
    found = bits.fetchone()
    shape = config.model
    if isinstance(model, gemma.Decoder):
        gemma.save(gemma.Gemma(model), directory)
        tokenizer.save(directory)
        kind, inner, usage = f"A {model.config.model_type} fine-tuned", "feed-forward", USAGE_OF_GEMMA
    else:
        own = dataclasses.replace(config, run_dir=None)
        huggingface_model.write(directory, model, huggingface_model.by_path(model), to_dict(own))
        tokenizer.save(directory / "tokenizer")
        kind, inner, usage = "A mixture-of-experts language model trained", f"{shape.num_experts} experts", USAGE
    card = CARD.format(
        name=directory.name,
        kind=kind,
        usage=usage.format(name=directory.name),
        version=__version__,
        parameters=count(model),
        shape=f"{shape.num_layers} layers of {shape.hidden_size}, {inner} of {shape.ffn_dim}",
        step=step,
        batch=config.optim.batch_size,
        seq=shape.max_seq_len,
        fingerprint=about["fingerprints"]["data"],
        bits="not measured" if found is None else f"{found[0]:.4f}",
    )
    (directory / "README.md").write_text(card)


def main(argv: list[str]) -> int:
    try:
        settings = tyro.cli(Settings, args=argv, description=__doc__)
        export(settings.run, settings.directory)
    except ValueError as refusal:
        print(refusal, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
