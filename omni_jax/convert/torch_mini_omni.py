"""The published Mini-Omni in PyTorch: names and arithmetic of its model, without a cache and without generation.

What an export is compared with. torch is imported with this module, which is imported where it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from omni_jax.vocab import NUM_CODEBOOKS, NUM_STREAMS


class Norm(nn.Module):
    """Root mean square norm."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class GatedMLP(nn.Module):
    """Gated SiLU MLP without biases."""

    def __init__(self, inputs: int, intermediate_size: int, outputs: int):
        super().__init__()
        self.fc_1 = nn.Linear(inputs, intermediate_size, bias=False)
        self.fc_2 = nn.Linear(inputs, intermediate_size, bias=False)
        self.proj = nn.Linear(intermediate_size, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return self.proj(functional.silu(self.fc_1(x)) * self.fc_2(x))


class Attention(nn.Module):
    """Causal attention with rope; query, key and value in one matrix, grouped by key/value head."""

    def __init__(self, c: Mapping[str, Any]):
        super().__init__()
        self.heads = c["n_head"]
        self.groups = c["n_query_groups"] or self.heads
        self.size = c["head_size"] or c["n_embd"] // self.heads
        self.base = c["rope_base"]
        rows = (self.heads + 2 * self.groups) * self.size
        self.attn = nn.Linear(c["n_embd"], rows, bias=bool(c["add_qkv_bias"]))
        self.proj = nn.Linear(self.heads * self.size, c["n_embd"], bias=False)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate half against half: the pair (i, i + size/2) by position * base^(-2i/size)."""
        T, half = x.shape[-2], self.size // 2
        angle = torch.arange(T)[:, None] * self.base ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        B, T, _ = x.shape
        each = self.heads // self.groups
        # One group after the other; in each its queries, its key, its value.
        queries: list[Tensor] = []
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for group in self.attn(x).split((each + 2) * self.size, dim=-1):
            *q, k, v = group.split(self.size, dim=-1)
            queries += q
            keys += [k] * each
            values += [v] * each
        q, k, v = (torch.stack(heads, 1) for heads in (queries, keys, values))
        scores = self.rotate(q) @ self.rotate(k).transpose(-1, -2) / self.size**0.5
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf"))
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1))


class Block(nn.Module):
    """A transformer layer."""

    def __init__(self, c: Mapping[str, Any]):
        super().__init__()
        self.norm_1 = Norm(c["n_embd"], c["norm_eps"])
        self.attn = Attention(c)
        self.norm_2 = Norm(c["n_embd"], c["norm_eps"])
        self.mlp = GatedMLP(c["n_embd"], c["intermediate_size"], c["n_embd"])

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class MiniOmni(nn.Module):
    """The model of a `model_config.yaml`; its state dict is `lit_model.pth`."""

    def __init__(self, c: Mapping[str, Any]):
        """Make a model with random weights.

        Args:
            c: the fields of `model_config.yaml`; see `omni_jax.convert.mini_omni.with_defaults`.
        """
        super().__init__()
        self.c = c
        D = c["n_embd"]
        self.lm_head = nn.Linear(D, c["padded_vocab_size"], bias=False)
        modules: dict[str, Any] = {
            "wte": nn.Embedding(c["padded_vocab_size"], D),
            "h": nn.ModuleList(Block(c) for _ in range(c["n_layer"])),
            "ln_f": Norm(D, c["norm_eps"]),
        }
        if c["post_adapter"]:
            modules["post_adapter"] = nn.ModuleList(Block(c) for _ in range(c["post_adapter_layers"]))
            modules["post_adapter_audio_ln"] = Norm(D, c["norm_eps"])
            modules["post_adapter_audio_lm_head"] = nn.Linear(D, c["cat_audio_vocab_size"], bias=False)
        self.transformer: Any = nn.ModuleDict(modules)
        self.whisper_adapter: nn.Module
        if c["asr_adapter"] == "mlp":
            self.whisper_adapter = nn.Linear(c["whisper_adapter_dim"], D)
        else:
            self.whisper_adapter = GatedMLP(c["whisper_adapter_dim"], c["intermediate_size"], D)
        if c["tie_word_embeddings"]:
            self.lm_head.weight = modules["wte"].weight

    def forward(self, tokens: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Whole sequences to logits.

        Args:
            tokens: int [B, 8, T], local to their stream.
            features: f32 [B, A, E] of speech at positions 1..A, or None.

        Returns:
            Text logits [B, T, text rows] and audio logits [B, T, 7, audio rows].
        """
        c, modules = self.c, self.transformer
        text, audio = c["text_vocab_size"], c["audio_vocab_size"]
        streams = [modules["wte"](tokens[:, k] + text + k * audio) for k in range(NUM_CODEBOOKS)]
        if features is not None:
            speech = self.whisper_adapter(features)
            for stream in streams:
                stream[:, 1 : 1 + speech.shape[1]] = speech
        x = sum([*streams, modules["wte"](tokens[:, NUM_CODEBOOKS])]) / NUM_STREAMS
        for block in modules["h"]:
            x = block(x)
        logits = self.lm_head(modules["ln_f"](x))
        audio_logits = logits[..., text:]
        if c["post_adapter"]:
            for block in modules["post_adapter"]:
                x = block(x)
            audio_logits = modules["post_adapter_audio_lm_head"](modules["post_adapter_audio_ln"](x))
        return logits[..., :text], audio_logits.unflatten(-1, (NUM_CODEBOOKS, audio))
