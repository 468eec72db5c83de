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
# What is read as it stands.
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
    "eos_token_id": int,
    "bos_token_id": int,
}
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
    pad_token_id: int = 0
    eos_token_id: int = 1
    bos_token_id: int = 2

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
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable ({error}); give a Gemma folder of Hugging Face.") from None
    if not isinstance(described, dict):
        raise ValueError(f"{path}: not a JSON object; give a Gemma folder of Hugging Face.")
    if described.get("model_type") == "gemma3" and isinstance(described.get("text_config"), dict):
        described = described["text_config"]
    family = described.get("model_type")
    if family not in ARCHITECTURES:
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
    if activation not in ("gelu", "gelu_pytorch_tanh"):
        raise ValueError(f"{path}: hidden_activation={activation!r} must be 'gelu_pytorch_tanh'.")
    fields = dataclasses.fields(GemmaConfig)
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in described]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} must be given; take the file from the model's own folder.")
    given = {name: described[name] for name in _NUMBERS if described.get(name) is not None}
    if isinstance(given.get("eos_token_id"), list):
        given["eos_token_id"] = given["eos_token_id"][0]
    given["layer_types"] = _layer_types(family, described)
    if family == "gemma":
        # Gemma 1 divides by the root of the head's width, whatever else its file says.
        given["query_pre_attn_scalar"] = described["head_dim"]
    if family == "gemma2":
        # A file that leaves them out has them; null has none.
        caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        given |= {name: cap for name, cap in caps.items() if name not in described}
    given |= _rope(path, family, described)
    for name, kind in _NUMBERS.items():
        value = given.get(name)
        if value is not None and (not isinstance(value, (kind, int)) or isinstance(value, bool) != (kind is bool)):
            raise ValueError(f"{path}: {name}={value!r} must be of type {kind.__name__}; mend the file.")
        if value is not None:
            given[name] = kind(value)
    return GemmaConfig(model_type=family, **given)


def _layer_types(family: Family, described: dict[str, Any]) -> tuple[LayerKind, ...]:
    layers = described["num_hidden_layers"]
    if described.get("layer_types") is not None:
        return tuple(described["layer_types"])
    if family == "gemma":
        return ("full_attention",) * layers
    pattern = described.get("sliding_window_pattern") or described.get("_sliding_window_pattern") or _PATTERN[family]
    return tuple("full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers))


def _rope(path: Path, family: Family, described: dict[str, Any]) -> dict[str, float]:
    parameters = described.get("rope_parameters")
    if parameters is None:
        default = 1_000_000.0 if family == "gemma3_text" else 10_000.0
        scaling = described.get("rope_scaling") or {}
        full = {"rope_theta": described.get("rope_theta", default), **scaling}
        local = {"rope_theta": described.get("rope_local_base_freq", 10_000.0)}
    elif "full_attention" in parameters or "sliding_attention" in parameters:
        full, local = parameters.get("full_attention") or {}, parameters.get("sliding_attention") or {}
    else:
        full = local = parameters
    for each in (full, local):
        kind = each.get("rope_type") or each.get("type") or "default"
        if kind not in ("default", "linear"):
            raise ValueError(f"{path}: rope_type={kind!r} must be 'default' or 'linear', as in every Gemma.")
    theta = full.get("rope_theta", 10_000.0)
    local_theta = local.get("rope_theta", 10_000.0) if family == "gemma3_text" else theta
    return {
        "rope_theta": float(theta),
        "rope_factor": float(full.get("factor", 1.0)),
        "rope_local_theta": float(local_theta),
    }


def _check(path: Path, config: GemmaConfig) -> None:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name in (*sizes, "num_key_value_heads", "head_dim", "sliding_window"):
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"{path}: {name}={value} must be at least 1; mend the file.")
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
    unknown = set(config.layer_types) - {"sliding_attention", "full_attention"}
    if unknown:
        raise ValueError(
            f"{path}: layer_types holds {sorted(unknown)[0]!r}; they are 'sliding_attention' and 'full_attention'."
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
    for name in ("rope_theta", "rope_factor", "rope_local_theta"):
        del described[name]
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_factor != 1:
        full |= {"rope_type": "linear", "factor": config.rope_factor}
    if config.model_type == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": config.rope_local_theta}
        described["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
        described["use_bidirectional_attention"] = False
    else:
        described["rope_parameters"] = full
    if config.model_type == "gemma":
        described["hidden_act"] = described.pop("hidden_activation")
        for name in ("layer_types", "sliding_window", "query_pre_attn_scalar"):
            del described[name]
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            del described[name]
    return described
