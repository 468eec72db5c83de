"""Weights in a Hugging Face folder: safetensors in one file or many, read slice by slice, and written back."""

import contextlib
import functools
import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

Tree = TypeVar("Tree")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# Bytes of a file at most, when written.
SHARD_BYTES = 4 * 1024**3
# What is transposed at a time: all at once, every number written is a line of the cache that is fetched anew. And the
# numbers more that a row of it takes: where rows are a power of two apart, the lines of a column drive each other out.
_ROWS, _COLUMNS, _APART = 128, 2048, 32
_READERS = 4
# Of a model that also sees: the text model's names come after one of these, and the others are not read.
_PREFIXES = ("language_model.", "model.language_model.")
_UNREAD = ("vision_tower", "multi_modal_projector", "embed_vision", "rotary_emb.inv_freq")


@dataclass(frozen=True)
class Source:
    """Where an array comes from."""

    names: tuple[str, ...]
    """The tensor, or that of each layer where the array is a stack."""
    stacked: bool
    transposed: bool


def by_path(tree: Any) -> Any:
    """Each array under the name of its place in a tree, as it is: how this project's own models are written."""

    def source(path: tuple[Any, ...], _leaf: Any) -> Source:
        return Source((jax.tree_util.keystr(path, simple=True, separator="."),), stacked=False, transposed=False)

    return jax.tree_util.tree_map_with_path(source, tree)


def files_in(folder: Path) -> bool:
    """Whether a folder holds weights of this kind."""
    return (folder / SINGLE).exists() or (folder / INDEX).exists()


class Weights:
    """The tensors of a folder by name, opened but not read.

    **Raises** ValueError where a file is missing, or is not what safetensors writes.
    """

    def __init__(self, folder: Path, stack: contextlib.ExitStack):
        self.folder, self._tensors, self._files = folder, {}, {}
        for path in _files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="np"))
                names = list(file.keys())
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path}: damaged or incomplete ({error}); fetch it again.") from None
            for name in names:
                if (other := self._files.get(_plain(name))) is not None:
                    raise ValueError(f"{path}: holds {name}, which {other} holds too; fetch the files again.")
                self._tensors[_plain(name)] = file.get_slice(name)
                self._files[_plain(name)] = path

    def check(self, wanted: Mapping[str, tuple[int, ...]], optional: tuple[str, ...] = ()) -> None:
        """Refuse the folder unless it holds these tensors of these shapes, and no other."""
        problems = []
        for name, shape in wanted.items():
            if name not in self._tensors:
                problems.append(f"{self.folder}: no tensor {name!r}; fetch the files again, or mend config.json")
                continue
            found, dtype = tuple(self._tensors[name].get_shape()), self._tensors[name].get_dtype()
            if found != shape:
                problems.append(
                    f"{self._files[name]}: {name} has shape {list(found)}, config.json means {list(shape)}; "
                    "take both from the same model"
                )
            elif dtype not in DTYPES:
                problems.append(
                    f"{self._files[name]}: {name} has dtype {dtype}, not one of {', '.join(DTYPES)}; convert it"
                )
        for name in self._tensors:
            if name not in wanted and name not in optional and not any(part in name for part in _UNREAD):
                problems.append(f"{self._files[name]}: {name} has no place in the model that config.json describes")
        if problems:
            shown = problems[:5] + [f"... and {len(problems) - 5} more"] * (len(problems) > 5)
            raise ValueError("\n".join(shown))

    def shape(self, name: str) -> list[int] | None:
        """The shape of a tensor; None if there is no such."""
        return list(self._tensors[name].get_shape()) if name in self._tensors else None

    def slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, read from its file."""
        return self._tensors[name][index]


def _plain(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            return rest if rest.startswith(("model.", "lm_head.")) else f"model.{rest}"
    return name


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder; give one with config.json and {SINGLE}.")
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise ValueError(f"{folder}: neither {SINGLE} nor {INDEX} is in it; fetch the model's weights.")
        return [folder / SINGLE]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: not an index of safetensors files ({error!r}); fetch it again.") from None
    if outside:
        raise ValueError(f"{index}: names {outside[0]!r}, which is not a file of this folder; fetch it again.")
    present = {entry.name for entry in folder.iterdir()}
    missing = [name for name in names if name not in present]
    if missing:
        raise ValueError(f"{folder}: {missing[0][:100]} is missing, which {INDEX} names; fetch it.")
    return [folder / name for name in names]


def read(folder: Path, abstract: Tree, sources: Any, dtype: np.dtype, shardings: Any = None) -> Tree:
    """The arrays of `abstract` from their `sources`, cast to `dtype`; each device's slices alone where sharded."""
    leaves, structure = jax.tree.flatten(abstract)
    origins = structure.flatten_up_to(sources)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = [here] * len(leaves) if shardings is None else structure.flatten_up_to(shardings)
    with contextlib.ExitStack() as stack:
        weights = _opened(folder, abstract, sources, stack)
        arrays = [
            jax.make_array_from_callback(
                leaf.shape, place, functools.partial(_part, weights, origin, leaf.shape, dtype)
            )
            for leaf, origin, place in zip(leaves, origins, places, strict=True)
        ]
        return jax.tree.unflatten(structure, jax.block_until_ready(arrays))


def differ(folder: Path, one: str, other: str) -> bool:
    """Whether a folder holds both of two tensors, and they are not the same."""
    with contextlib.ExitStack() as stack:
        weights = Weights(folder, stack)
        shape = weights.shape(one)
        if shape is None or weights.shape(other) is None:
            return False
        if shape != weights.shape(other) or not shape:
            return True
        # As bytes: a NaN is the same as itself here.
        parts = ((slice(start, min(start + _COLUMNS, shape[0])),) for start in range(0, shape[0], _COLUMNS))
        return any(weights.slice(one, part).tobytes() != weights.slice(other, part).tobytes() for part in parts)


def check(folder: Path, abstract: Any, sources: Any) -> None:
    """Refuse, as `read` does, a folder that has not the arrays of `abstract`; the headers of its files are read."""
    with contextlib.ExitStack() as stack:
        _opened(folder, abstract, sources, stack)


def _opened(folder: Path, abstract: Any, sources: Any, stack: contextlib.ExitStack) -> Weights:
    weights = Weights(folder, stack)
    leaves, structure = jax.tree.flatten(abstract)
    wanted = {
        name: tuple(reversed(shape)) if origin.transposed else shape
        for leaf, origin in zip(leaves, structure.flatten_up_to(sources), strict=True)
        for name in origin.names
        for shape in (leaf.shape[1:] if origin.stacked else leaf.shape,)
    }
    # Files of a tied head may hold it once more.
    weights.check(wanted, optional=("lm_head.weight",))
    return weights


def _part(
    weights: Weights, origin: Source, shape: tuple[int, ...], dtype: np.dtype, index: tuple[slice, ...]
) -> np.ndarray:
    """What `index` selects of an array."""
    ranges = [range(size)[part] for size, part in zip(shape, index, strict=True)]
    names = [origin.names[i] for i in ranges[0]] if origin.stacked else origin.names
    inner = tuple(slice(each.start, each.stop) for each in (ranges[1:] if origin.stacked else ranges))
    part = _empty([len(each) for each in ranges], dtype)

    def fill(place: np.ndarray, name: str) -> None:
        if not origin.transposed:
            place[...] = weights.slice(name, inner)
            return
        columns, rows = (range(size)[part] for size, part in zip(shape[-2:], inner, strict=True))
        tile = np.empty((_ROWS, _COLUMNS + _APART), dtype)
        for i in range(0, len(rows), _ROWS):
            for j in range(0, len(columns), _COLUMNS):
                here = rows[i : i + _ROWS], columns[j : j + _COLUMNS]
                piece = tile[: len(here[0]), : len(here[1])]
                piece[...] = weights.slice(name, tuple(slice(each.start, each.stop) for each in here))
                place[j : j + _COLUMNS, i : i + _ROWS] = piece.T

    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(fill, part if origin.stacked else [part], names))
    return part


def _empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Memory that begins where a line of the cache does: such an array the CPU's devices take over without a copy."""
    size, line = math.prod(shape) * dtype.itemsize, 64
    memory = np.empty(size + line, np.uint8)
    begin = -memory.ctypes.data % line
    return memory[begin : begin + size].view(dtype).reshape(shape)


def write(folder: Path, tree: Any, sources: Any, description: Mapping[str, Any]) -> None:
    """The reverse of `read`: config.json, and the arrays in files of at most `SHARD_BYTES`, indexed if several."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, np.ndarray]] = [{}]
    room = SHARD_BYTES
    for name, tensor in _tensors(tree, sources):
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = tensor
        room -= tensor.nbytes
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    )
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})
    # What was there of another division would be read for these, or beside them.
    for path in [folder / INDEX, folder / SINGLE, *folder.glob("model-*-of-*.safetensors")]:
        if path.name not in files:
            path.unlink(missing_ok=True)
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        placed = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": placed}, indent=2))
    (folder / "config.json").write_text(json.dumps(dict(description), indent=2))


def _tensors(tree: Any, sources: Any) -> Iterator[tuple[str, np.ndarray]]:
    leaves, structure = jax.tree.flatten(tree)
    for leaf, origin in zip(leaves, structure.flatten_up_to(sources), strict=True):
        for number, name in enumerate(origin.names):
            tensor = np.asarray(leaf[number] if origin.stacked else leaf)
            yield name, np.ascontiguousarray(tensor.T if origin.transposed else tensor)
