"""What the arrays of a Gemma are called in the files of Hugging Face, and which of them a folder has."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from vishwamai_eqx import gemma_config, huggingface_model
from vishwamai_eqx.gemma_config import GemmaConfig
from vishwamai_eqx.layers import TPUGEMMLinear

# Where the file's name differs from the field's; weights of files are [out, in].
_FIELDS = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
# In Gemma 1 the second norm of a layer bears the name that in later ones a norm after attention has.
_NORMS = {"mlp_norm": "post_attention_layernorm"}
_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def configuration(folder: Path) -> GemmaConfig:
    """The configuration of a folder as its files have it: where they hold another head than the embedding, the head is
    not tied, whatever config.json says. So does transformers.

    **Raises** ValueError where there is none, or it is another model's.
    """
    config = gemma_config.read(folder)
    if config.tie_word_embeddings and huggingface_model.files_in(folder):
        tied = not huggingface_model.differ(folder, _EMBEDDING, _HEAD)
        return dataclasses.replace(config, tie_word_embeddings=tied)
    return config


def names(decoder: Any) -> Any:
    """A tree like `decoder`, a `gemma.Decoder`, of the `huggingface_model.Source` of each array."""
    config: GemmaConfig = decoder.config
    fields = _FIELDS | (_POST_NORMS if config.has_post_norms else _NORMS)
    outside = {
        "embedding": _EMBEDDING,
        "norm": "model.norm.weight",
        "untied_head": _HEAD,
    }

    def source(path: tuple[Any, ...], leaf: Any) -> huggingface_model.Source:
        keys = [str(getattr(entry, "name", getattr(entry, "idx", None))) for entry in path]
        if keys[0] in outside:
            return huggingface_model.Source((outside[keys[0]],), stacked=False, transposed=False)
        first, field = int(keys[1]), ".".join(keys[2:-1])
        if keys[0] == "rest":
            layers = [config.num_hidden_layers - len(decoder.rest) + first]
        else:
            layers = range(first, config.num_hidden_layers - len(decoder.rest), config.period)
        module = decoder.period[0]
        for name in keys[2:-1]:
            module = getattr(module, name)
        # A linear map that makes more features than it takes is stored [in, out].
        transposed = isinstance(module, TPUGEMMLinear) and module.features >= module.in_features
        return huggingface_model.Source(
            tuple(f"model.layers.{layer}.{fields[field]}.weight" for layer in layers), True, transposed
        )

    return jax.tree_util.tree_map_with_path(source, decoder)
