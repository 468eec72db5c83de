"""A training step of a dense decoder in PyTorch, run when a line comes on standard input and answered with one.

A process of its own, so that PyTorch has its own allocator settings and threads, and jax its own. Of the shape of
preset tiny's dense equivalent: grouped-query attention through `scaled_dot_product_attention`, rotary positions, gated
feed-forward, layer norm, tied head, AdamW; eager in f32, or `torch.compile` with bf16 autocast.
"""

import json
import sys

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, d, heads, kv_heads, ffn, angles):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.widths = [d, kv_heads * d // heads, kv_heads * d // heads]
        self.head_dim = d // heads
        self.qkv, self.out = nn.Linear(d, sum(self.widths), bias=False), nn.Linear(d, d, bias=False)
        self.gate_up, self.down = nn.Linear(d, 2 * ffn, bias=False), nn.Linear(ffn, d, bias=False)
        self.cos, self.sin = angles.cos()[None, None], angles.sin()[None, None]

    def rotate(self, x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], dim=-1).to(x.dtype)

    def forward(self, x):
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (t.view(heads).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(self.widths, -1))
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    def __init__(self, vocab, d, layers, heads, kv_heads, ffn, seq, theta):
        super().__init__()
        half = d // heads // 2
        angles = torch.outer(torch.arange(seq), theta ** (-torch.arange(half) / half))
        self.embedding = nn.Embedding(vocab, d)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(d, heads, kv_heads, ffn, angles) for _ in range(layers))
        self.norm = nn.LayerNorm(d)

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.view(-1))


def main(settings: dict) -> None:
    compiled, rows = settings.pop("compiled"), settings.pop("rows")
    torch.manual_seed(0)
    torch.set_num_threads(2)
    decoder = Decoder(**settings)
    adamw = torch.optim.AdamW(decoder.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=compiled)
    tokens = torch.randint(0, settings["vocab"], (rows, settings["seq"]))
    targets = tokens.roll(-1, dims=1)
    forward = torch.compile(decoder) if compiled else decoder
    for _line in sys.stdin:
        adamw.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=compiled):
            loss = forward(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        adamw.step()
        print(f"{loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
