"""The configuration of Gemma 1, 2 and 3 (text), from and to a Hugging Face `config.json` in both of its dialects.

transformers 5 writes `rope_parameters`, `dtype` and `layer_types`; earlier versions wrote `rope_theta`, `rope_scaling`,
`rope_local_base_freq`, `torch_dtype` and `sliding_window_pattern`.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from vishwamai_eqx.factors import divisors

Family = Literal["gemma", "gemma2", "gemma3_text"]
LayerKind = Literal["sliding_attention", "full_attention"]
ARCHITECTURES: dict[Family, str] = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
# What is read as it stands, if it is given and not null.
_NUMBERS: dict[str, type[int] | type[float] | type[bool]] = {
    "vocab_size": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "head_dim": int,
    "max_position_embeddings": int,
    "rms_norm_eps": float,
    "tie_word_embeddings": bool,
    "sliding_window": int,
    "query_pre_attn_scalar": int,
    "attn_logit_softcapping": float,
    "final_logit_softcapping": float,
    "pad_token_id": int,
    "bos_token_id": int,
    "initializer_range": float,
    "use_cache": bool,
}
# What a file means that leaves it out: files of the hub do, those of Gemma 3 that sees most of it.
_DEFAULTS: dict[Family, dict[str, int | float]] = {
    "gemma": {
        "vocab_size": 256_000,
        "hidden_size": 3072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
    },
    "gemma2": {
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
    },
}
# More than any Gemma has; what is beyond is no count of layers.
_LAYERS = 1000
# A window on all layers but each n-th, where a file of the earlier dialect does not say.
_PATTERN: dict[Family, int] = {"gemma2": 2, "gemma3_text": 6}


@dataclass(frozen=True)
class GemmaConfig:
    """What decides the shapes and the arithmetic of a Gemma; fields are named as in `config.json`."""

    model_type: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    layer_types: tuple[LayerKind, ...] = ()
    """Each layer's kind; all attend fully where none is given."""
    sliding_window: int = 4096
    query_pre_attn_scalar: int = 256
    """Scores are divided by its root."""
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    rope_theta: float = 10_000.0
    """Of full layers."""
    rope_factor: float = 1.0
    """Positions of full layers are divided by it."""
    rope_local_theta: float = 10_000.0
    """Of sliding layers."""
    rope_local_factor: float = 1.0
    pad_token_id: int = 0
    eos_token_id: tuple[int, ...] = (1,)
    """Any of them ends a text."""
    bos_token_id: int = 2
    initializer_range: float = 0.02
    """Kept for whoever trains it elsewhere, as is `use_cache`."""
    use_cache: bool = True

    def __post_init__(self) -> None:
        if not self.layer_types:
            object.__setattr__(self, "layer_types", ("full_attention",) * self.num_hidden_layers)

    @property
    def has_post_norms(self) -> bool:
        """Whether each branch is normed once more before it joins the residual stream."""
        return self.model_type != "gemma"

    @property
    def has_qk_norm(self) -> bool:
        return self.model_type == "gemma3_text"

    @property
    def model_settings(self) -> dict[str, Any]:
        """What it has in common with the settings of VishwamAI, under their names, and what those have to be here."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_hidden_layers,
            "num_heads": self.num_attention_heads,
            "num_kv_heads": self.num_key_value_heads,
            "num_experts": 1,
            "experts_per_token": 1,
            "ffn_dim": self.intermediate_size,
            "attention_pattern": "full",
            "rope_theta": self.rope_theta,
            "tie_embeddings": self.tie_word_embeddings,
            "dropout_rate": 0.0,
            "scan_unroll": 1,
        }

    @property
    def period(self) -> int:
        """Layers after which the kinds repeat."""
        kinds = self.layer_types
        return next(p for p in range(1, len(kinds) + 1) if all(k == kinds[i % p] for i, k in enumerate(kinds)))


# Of which a dry run needs no folder.
SHAPES = {"gemma-7b": GemmaConfig("gemma", 256_000, 3072, 24_576, 28, 16, 16, 256)}


def read(folder: Path) -> GemmaConfig:
    """The configuration of a folder.

    **Raises** ValueError where there is none, it is another model's, or it asks for what Gemma does not have.
    """
    path = folder / "config.json"
    try:
        described = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable ({error}); give a Gemma folder of Hugging Face.") from None
    if not isinstance(described, dict):
        raise ValueError(f"{path}: not a JSON object; give a Gemma folder of Hugging Face.")
    if described.get("model_type") == "gemma3" and isinstance(described.get("text_config"), dict):
        described = described["text_config"]
    family = described.get("model_type")
    if family not in list(ARCHITECTURES):
        raise ValueError(
            f"{path}: model_type={family!r} must be one of {', '.join(ARCHITECTURES)}; give a Gemma folder."
        )
    config = _config(path, cast(Family, family), described)
    _check(path, config)
    return config


def _config(path: Path, family: Family, described: dict[str, Any]) -> GemmaConfig:
    for name, wanted in (("attention_bias", False), ("use_bidirectional_attention", False), ("attention_dropout", 0.0)):
        if described.get(name) not in (None, wanted):
            raise ValueError(
                f"{path}: {name}={described[name]!r} must be {wanted!r}: Gemma's text models have no other."
            )
    # The first hub files say "gelu" and mean its tanh form.
    activation = described.get("hidden_activation") or described.get("hidden_act") or "gelu_pytorch_tanh"
    if activation not in ["gelu_pytorch_tanh", *(["gelu"] if family == "gemma" else [])]:
        raise ValueError(f"{path}: hidden_activation={activation!r} must be 'gelu_pytorch_tanh'.")
    given: dict[str, Any] = dict(_DEFAULTS[family])
    for name, kind in _NUMBERS.items():
        if name in given and name in described and described[name] is None:
            # A file that leaves soft-caps out has its family's; null has none.
            if not name.endswith("softcapping"):
                raise ValueError(f"{path}: {name}=None must be a number; take the file from the model's own folder.")
            given[name] = None
        if described.get(name) is not None:
            given[name] = _number(path, name, described[name], kind)
    if not 1 <= given["num_hidden_layers"] <= _LAYERS:
        raise ValueError(f"{path}: num_hidden_layers={given['num_hidden_layers']} must be from 1 to {_LAYERS}.")
    ends = described.get("eos_token_id")
    if ends is not None:
        ends = ends if isinstance(ends, list) and ends else [ends]
        given["eos_token_id"] = tuple(_number(path, "eos_token_id", end, int) for end in ends)
    given["layer_types"] = _layer_types(path, family, given["num_hidden_layers"], described)
    if "sliding_attention" in given["layer_types"] and described.get("sliding_window", 4096) is None:
        raise ValueError(f"{path}: sliding_window=None must be a number where layers slide; take 4096.")
    if family == "gemma":
        # Gemma 1 divides by the root of the head's width, whatever else its file says, and caps nothing.
        given["query_pre_attn_scalar"] = given["head_dim"]
        given["attn_logit_softcapping"] = given["final_logit_softcapping"] = None
    return GemmaConfig(model_type=family, **given, **_rope(path, family, described))


def _number(path: Path, name: str, value: Any, kind: type[int] | type[float] | type[bool]) -> Any:
    """The value as a number of that type; ValueError where it is none, or none that can be computed with."""
    whole = isinstance(value, float) and value.is_integer()
    if kind is int and name == "query_pre_attn_scalar" and whole:
        value = int(value)
    if not isinstance(value, (kind, int)) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{path}: {name}={value!r} must be of type {kind.__name__}; mend the file.")
    if abs(value) >= 2**31 or value != value:
        raise ValueError(f"{path}: {name}={str(value)[:20]} must be a number below 2**31; mend the file.")
    return kind(value)


def _layer_types(path: Path, family: Family, layers: int, described: dict[str, Any]) -> tuple[LayerKind, ...]:
    kinds = described.get("layer_types")
    if kinds is not None:
        known = ["sliding_attention", "full_attention"]
        unknown = [kind for kind in kinds if kind not in known] if isinstance(kinds, list) else [kinds]
        if unknown:
            raise ValueError(f"{path}: layer_types holds {unknown[0]!r}; it is a list of {' and '.join(known)}.")
        return tuple(kinds)
    if family == "gemma":
        return ("full_attention",) * layers
    pattern = described.get("sliding_window_pattern") or described.get("_sliding_window_pattern") or _PATTERN[family]
    pattern = _number(path, "sliding_window_pattern", pattern, int)
    if pattern < 1:
        raise ValueError(f"{path}: sliding_window_pattern={pattern} must be at least 1; take {_PATTERN[family]}.")
    return tuple("full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers))


def _rope(path: Path, family: Family, described: dict[str, Any]) -> dict[str, float]:
    """Base and factor of full layers, and of sliding ones: but for Gemma 3 they are the same."""
    theta, local_theta = (1_000_000.0 if family == "gemma3_text" else 10_000.0), 10_000.0
    parameters = described.get("rope_parameters")
    if parameters is None:
        full = _object(path, "rope_scaling", described.get("rope_scaling"))
        theta, local_theta = (
            default if described.get(name) is None else described[name]
            for name, default in (("rope_theta", theta), ("rope_local_base_freq", local_theta))
        )
        local = {}
    else:
        parameters = full = local = _object(path, "rope_parameters", parameters)
        if "full_attention" in parameters or "sliding_attention" in parameters:
            full, local = (
                _object(path, f"rope_parameters.{kind}", parameters.get(kind))
                for kind in ("full_attention", "sliding_attention")
            )
    found = _turn(path, full, theta)
    sliding = _turn(path, local, local_theta) if family == "gemma3_text" else found
    names = ("rope_theta", "rope_factor", "rope_local_theta", "rope_local_factor")
    return dict(zip(names, found + sliding, strict=True))


def _turn(path: Path, parameters: dict[str, Any], theta: Any) -> tuple[float, float]:
    """Base of the wavelengths, and what positions are divided by."""
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in ["default", "linear"]:
        raise ValueError(f"{path}: rope_type={kind!r} must be 'default' or 'linear', as in every Gemma.")
    if parameters.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(f"{path}: partial_rotary_factor={parameters['partial_rotary_factor']!r} must be 1.")
    if kind == "linear" and parameters.get("factor") is None:
        raise ValueError(f"{path}: rope_type='linear' must come with a factor; take it from the model's own file.")
    factor = parameters["factor"] if kind == "linear" else 1.0
    values = {"rope_theta": theta if parameters.get("rope_theta") is None else parameters["rope_theta"]}
    values["factor"] = factor
    for name, value in values.items():
        if not _number(path, name, value, float) > 0:
            raise ValueError(f"{path}: {name}={value!r} must be above 0; take it from the model's own file.")
    return float(values["rope_theta"]), float(factor)


def _object(path: Path, name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{path}: {name}={value!r} must be a JSON object; mend the file.")
    return value or {}


def _check(path: Path, config: GemmaConfig) -> None:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    sizes += ("head_dim", "sliding_window", "query_pre_attn_scalar", "max_position_embeddings")
    for name in sizes:
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"{path}: {name}={value} must be at least 1; mend the file.")
    for name in ("rms_norm_eps", "attn_logit_softcapping", "final_logit_softcapping"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{path}: {name}={value} must be above 0; mend the file.")
    if config.has_qk_norm and config.attn_logit_softcapping is not None:
        raise ValueError(
            f"{path}: attn_logit_softcapping={config.attn_logit_softcapping} must be null: Gemma 3 norms queries and "
            "keys instead; take the file from the model's own folder."
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"{path}: num_key_value_heads={config.num_key_value_heads} must divide num_attention_heads="
            f"{config.num_attention_heads}; take one of {divisors(config.num_attention_heads)}."
        )
    if config.head_dim % 2:
        raise ValueError(f"{path}: head_dim={config.head_dim} must be even: rotary positions turn pairs.")
    if len(config.layer_types) != config.num_hidden_layers:
        raise ValueError(
            f"{path}: layer_types has {len(config.layer_types)} entries for num_hidden_layers="
            f"{config.num_hidden_layers}; give one for each layer."
        )


def describe(config: GemmaConfig, dtype: str) -> dict[str, Any]:
    """`config.json` of that configuration, in the dialect of transformers 5, for weights stored as `dtype`."""
    described = {"architectures": [ARCHITECTURES[config.model_type]], "dtype": dtype, "attention_bias": False}
    described |= {
        "attention_dropout": 0.0,
        "use_bidirectional_attention": None,
        "hidden_activation": "gelu_pytorch_tanh",
    }
    described |= dataclasses.asdict(config) | {"layer_types": list(config.layer_types)}
    ends = config.eos_token_id
    described["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
    for name in ("rope_theta", "rope_factor", "rope_local_theta", "rope_local_factor"):
        del described[name]
    full = _turning(config.rope_theta, config.rope_factor)
    described["rope_parameters"] = full
    if config.model_type == "gemma3_text":
        local = _turning(config.rope_local_theta, config.rope_local_factor)
        described["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
        described["use_bidirectional_attention"] = False
    if config.model_type == "gemma":
        described["hidden_act"] = described.pop("hidden_activation")
        for name in ("layer_types", "sliding_window", "query_pre_attn_scalar"):
            del described[name]
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            del described[name]
    return described


def _turning(theta: float, factor: float) -> dict[str, Any]:
    linear = {"rope_type": "linear", "factor": factor} if factor != 1 else {"rope_type": "default"}
    return linear | {"rope_theta": theta}
