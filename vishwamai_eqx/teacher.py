"""The model that a run learns from: a Gemma folder of Hugging Face, or a run directory or an export of this project."""

import dataclasses
import json
from hashlib import blake2b
from pathlib import Path

import jax
import numpy as np

from vishwamai_eqx import (
    architecture,
    checkpoint,
    gemma,
    gemma_config,
    gemma_names,
    huggingface_model,
    manifest,
    run,
)
from vishwamai_eqx.architecture import Model
from vishwamai_eqx.config import Config
from vishwamai_eqx.mesh import gather
from vishwamai_eqx.tokenizer import VishwamAITokenizer


def configuration(folder: Path) -> Config:
    """What the teacher is; of a name in `gemma_config.SHAPES` that is no folder, its shape alone.

    **Raises** ValueError where there is no such model.
    """
    if not folder.exists() and str(folder) in gemma_config.SHAPES:
        return _of_gemma(gemma_config.SHAPES[str(folder)])
    path = folder / "config.json"
    try:
        described = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"teacher={str(folder)!r} must be a Gemma folder or a run: its config.json is not readable ({error}); take "
            f"another folder, or for a dry run one of {', '.join(gemma_config.SHAPES)}."
        ) from None
    return run.configuration(folder) if "preset" in described else _of_gemma(gemma_names.configuration(folder))


def _of_gemma(gemma: gemma_config.GemmaConfig) -> Config:
    model = dataclasses.replace(
        Config().model, **gemma.model_settings, max_seq_len=gemma.max_position_embeddings, remat="full"
    )
    return dataclasses.replace(Config(), gemma=gemma, model=model)


def tokenizer(folder: Path) -> VishwamAITokenizer:
    """The teacher's own; ValueError where its model has not a row for each piece."""
    config = configuration(folder)
    of_run = config.gemma is None or (folder / "tokenizer").exists()
    return run.tokenizer_of(folder, config) if of_run else gemma.tokenizer(folder)


def abstract(config: Config, dtype: str) -> Model:
    """The teacher of a configuration in shapes and types: what is cast for its products is kept in `dtype`."""
    return jax.eval_shape(lambda: gather(architecture.build(config, dtype, jax.random.key(0)), None, dtype))


def load(folder: Path, abstract: Model) -> Model:
    """Its weights in the types and places of `abstract`, each device reading its own shards.

    **Raises** ValueError where the folder has not its arrays.
    """
    config = configuration(folder)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if huggingface_model.files_in(folder):
        names = huggingface_model.by_path(abstract) if config.gemma is None else gemma_names.names(abstract)
        stored = abstract.embedding.weight.dtype if config.gemma is not None else np.dtype(np.float32)
        model = huggingface_model.read(folder, abstract, names, stored, shardings)
    else:
        wanted = jax.tree.map(lambda it: jax.ShapeDtypeStruct(it.shape, np.float32, sharding=it.sharding), abstract)
        model = checkpoint.read(folder / "checkpoints", {"model": wanted})["model"]

    def cast(model: Model) -> Model:
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), model, abstract)

    return jax.jit(cast, donate_argnums=0, out_shardings=shardings)(model)


def fingerprint(folder: Path) -> str:
    """Sixteen hexadecimal digits that name what the teacher knows, without reading all of it.

    **Raises** ValueError where a run has no checkpoint yet.
    """
    found = blake2b((folder / "config.json").read_bytes(), digest_size=8)
    if huggingface_model.files_in(folder):
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                found.update(repr([path.name, path.stat().st_size]).encode() + file.read(1 << 20))
    else:
        steps = checkpoint.steps(folder / "checkpoints")
        try:
            found.update(repr(manifest.read(folder / "checkpoints" / str(max(steps, default=0)))).encode())
        except manifest.DamagedError as error:
            raise ValueError(
                f"teacher={str(folder)!r} must have a good checkpoint, and of its newest {error}; train it first, or "
                "go on with it once, which puts a damaged one aside"
            ) from None
    return found.hexdigest()
