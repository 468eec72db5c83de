"""A run directory as a whole: what `vishwamai_eqx.load` reads back."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vishwamai_eqx import checkpoint, huggingface_model, saved_config
from vishwamai_eqx.architecture import Model, abstract
from vishwamai_eqx.config import Config
from vishwamai_eqx.corpus import Corpus
from vishwamai_eqx.mesh import gather
from vishwamai_eqx.precision import compute_dtype
from vishwamai_eqx.sentencepiece_training import ENOUGH_BYTES
from vishwamai_eqx.tokenizer import VishwamAITokenizer


class Loaded(NamedTuple):
    """What a run directory holds."""

    model: Model
    tokenizer: VishwamAITokenizer
    config: Config


def load(run_dir: str | Path, *, step: int | None = None, cast: bool = True) -> Loaded:
    """Model, tokenizer and configuration of a run, its newest good checkpoint or the one of `step`, or of an export.

    `cast` stores matrices in the compute type, for generation; without it they are f32, as trained. Raises ValueError
    if the directory is neither, or has no good checkpoint.
    """
    run_dir = Path(run_dir)
    config = configuration(run_dir)
    tokenizer = tokenizer_of(run_dir, config)
    if huggingface_model.files_in(run_dir):
        if step is not None:
            raise ValueError(f"step={step}: {run_dir} is an exported model, which has one state; leave it out.")
        wanted = abstract(config, compute_dtype(config.precision))
        model = huggingface_model.read(run_dir, wanted, huggingface_model.by_path(wanted), np.dtype(np.float32))
    else:
        model, _ = trained(run_dir, config, tokenizer, step)
    return Loaded(gather(model, None, compute_dtype(config.precision)) if cast else model, tokenizer, config)


def configuration(run_dir: Path) -> Config:
    """What a run was started with; ValueError if there is none."""
    config = saved_config.read(run_dir)
    if config is None:
        raise ValueError(f"run_dir={str(run_dir)!r} must be a run's: it has no config.json; train one with train.py.")
    return config


def make_tokenizer(config: Config, corpus: Corpus, teacher: VishwamAITokenizer | None = None) -> None:
    """At a run's first start put a tokenizer in its folder: the one to take, or of a teacher's pieces, or one trained.

    It learns from documents that are not held out, a sample of them where they are many. Raises ValueError if the model
    has not a row for each of its pieces.
    """
    assert config.run_dir is not None
    folder = config.run_dir / "tokenizer"
    # Without a configuration there is no run yet, and the tokenizer that a refused start left is not to be trusted.
    if saved_config.read(config.run_dir) is not None:
        return
    tokenizer = None if config.tokenizer is None else VishwamAITokenizer(config.tokenizer)
    saved_config.make_run_dir(config.run_dir)
    if tokenizer is not None:
        tokenizer.save(folder)
    elif teacher is not None:
        tokenizer = teacher.pruned(config.model.vocab_size, folder)
    else:
        text = corpus.training_text(ENOUGH_BYTES)
        tokenizer = VishwamAITokenizer.train(text, config.model.vocab_size, folder)
    if not fits(tokenizer, config):
        # What is fine-tuned has its rows already.
        fix = (
            f"--model.vocab-size {tokenizer.vocab_size}" if config.gemma is None else f"the tokenizer of {config.init}"
        )
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} must be the {tokenizer.vocab_size} pieces of the tokenizer in "
            f"{config.tokenizer or folder}; take {fix}."
        )


def tokenizer_of(run_dir: Path, config: Config) -> VishwamAITokenizer:
    """The tokenizer of a run that has begun, or of an export; ValueError if it cannot be its own."""
    tokenizer = VishwamAITokenizer(run_dir / "tokenizer")
    if not fits(tokenizer, config):
        raise ValueError(
            f"{run_dir / 'tokenizer'} has {tokenizer.vocab_size} pieces and must have the model's "
            f"{config.model.vocab_size}: the run's tokenizer has been exchanged; put its own back."
        )
    return tokenizer


def fits(tokenizer: VishwamAITokenizer, config: Config) -> bool:
    """Whether the model has a row for each piece, and only a Gemma, whose vocabularies are padded, more."""
    spare = config.model.vocab_size - tokenizer.vocab_size
    return spare == 0 or (spare > 0 and config.gemma is not None)


def trained(run_dir: Path, config: Config, tokenizer: VishwamAITokenizer, step: int | None = None) -> tuple[Model, int]:
    """The model of a run's newest good checkpoint, or of the one of `step`, in f32, and its step.

    Raises ValueError if there is none, or if it learned from another tokenizer.
    """
    wanted = {"model": abstract(config, compute_dtype(config.precision)), "step": jax.ShapeDtypeStruct((), jnp.int32)}
    fingerprints = {"tokenizer": tokenizer.fingerprint}
    saved = checkpoint.read(run_dir / "checkpoints", wanted, step=step, fingerprints=fingerprints)
    return saved["model"], int(saved["step"])
