"""Tiny random Gemma folders and what `transformers` computes with them, for tests that need neither torch nor it.

    python tests/parity/make_gemma.py [FOLDER] [--seed N]      in an environment with torch and transformers

Norms are not zero and scores are large, so that a missing 1 + w, soft-cap or scale shows.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
)

SHAPE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 16}
SHAPE |= {"max_position_embeddings": 64}
WINDOWS = {"sliding_window": 8, "query_pre_attn_scalar": 24}
CASES = {
    # One key and value head for all queries.
    "gemma": (GemmaForCausalLM, GemmaConfig(**SHAPE, num_hidden_layers=3, num_key_value_heads=1), torch.float32),
    # A period of two and one layer more.
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(**SHAPE, **WINDOWS, num_hidden_layers=3, num_key_value_heads=2),
        torch.bfloat16,
    ),
    # A period of six and two layers more, global positions divided by 8.
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **SHAPE,
            **WINDOWS,
            num_hidden_layers=8,
            num_key_value_heads=2,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
            },
        ),
        torch.float32,
    ),
}
ROWS, TOKENS, PROMPT, NEW = 2, 24, 6, 20


def make(folder: Path, name: str, seed: int) -> None:
    """A folder with the checkpoint and `expected.npz`."""
    torch.manual_seed(seed)
    kind, config, stored = CASES[name]
    model = kind(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(0, 0.3 if "norm" in key else 1.5 * parameter.shape[-1] ** -0.5)
    model.to(stored).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    # What the file holds is what is computed with, in f32; the model above has rounded its rotary frequencies too.
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.randint(0, config.vocab_size, (ROWS, TOKENS))
    blocks = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, y: blocks.append((y[0] if isinstance(y, tuple) else y).numpy()))
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits.numpy()
        hidden = np.stack(blocks)
        # Without a cache of its own, which would be another thing to trust.
        text = tokens[:, :PROMPT]
        for _ in range(NEW):
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    np.savez_compressed(
        folder / "expected.npz",
        tokens=tokens.numpy().astype(np.int32),
        logits=logits,
        hidden=hidden,
        prompt=tokens[:, :PROMPT].numpy().astype(np.int32),
        greedy=text[:, PROMPT:].numpy().astype(np.int32),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "gemma")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name in CASES:
        make(arguments.folder / name, name, arguments.seed)


if __name__ == "__main__":
    main()
