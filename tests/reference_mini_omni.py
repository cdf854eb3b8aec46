"""The published Mini-Omni in torch, for the tests: the same state dict keys and arithmetic, no cache, no generation."""

import torch
from torch import nn
from torch.nn import functional


class Scale(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Gated(nn.Module):
    def __init__(self, width, intermediate_size, out):
        super().__init__()
        self.fc_1 = nn.Linear(width, intermediate_size, bias=False)
        self.fc_2 = nn.Linear(width, intermediate_size, bias=False)
        self.proj = nn.Linear(intermediate_size, out, bias=False)

    def forward(self, x):
        return self.proj(functional.silu(self.fc_1(x)) * self.fc_2(x))


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.groups, self.size = c["n_head"], c["n_query_groups"], c["head_size"]
        self.base = c["rope_base"]
        rows = (self.heads + 2 * self.groups) * self.size
        self.attn = nn.Linear(c["n_embd"], rows, bias=c["add_qkv_bias"])
        self.proj = nn.Linear(self.heads * self.size, c["n_embd"], bias=False)

    def turn(self, x):
        """Rotate half against half: the pair (i, i + size/2) by position * base^(-2i/size)."""
        T, half = x.shape[-2], self.size // 2
        angle = torch.arange(T)[:, None] * self.base ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def forward(self, x):
        B, T, _ = x.shape
        each = self.heads // self.groups
        # One group after the other; in each its queries, its key, its value.
        queries, keys, values = [], [], []
        for group in self.attn(x).split((each + 2) * self.size, dim=-1):
            *q, k, v = group.split(self.size, dim=-1)
            queries += q
            keys += [k] * each
            values += [v] * each
        q, k, v = (torch.stack(heads, 1) for heads in (queries, keys, values))
        scores = self.turn(q) @ self.turn(k).transpose(-1, -2) / self.size**0.5
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf"))
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm_1 = Scale(c["n_embd"], c["norm_eps"])
        self.attn = Attention(c)
        self.norm_2 = Scale(c["n_embd"], c["norm_eps"])
        self.mlp = Gated(c["n_embd"], c["intermediate_size"], c["n_embd"])

    def forward(self, x):
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class MiniOmni(nn.Module):
    """Built from the fields of model_config.yaml."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        width = c["n_embd"]
        self.lm_head = nn.Linear(width, c["padded_vocab_size"], bias=False)
        parts = {
            "wte": nn.Embedding(c["padded_vocab_size"], width),
            "h": nn.ModuleList(Block(c) for _ in range(c["n_layer"])),
            "ln_f": Scale(width, c["norm_eps"]),
        }
        if c["post_adapter"]:
            parts["post_adapter"] = nn.ModuleList(Block(c) for _ in range(c["post_adapter_layers"]))
            parts["post_adapter_audio_ln"] = Scale(width, c["norm_eps"])
            parts["post_adapter_audio_lm_head"] = nn.Linear(width, c["cat_audio_vocab_size"], bias=False)
        self.transformer = nn.ModuleDict(parts)
        if c["asr_adapter"] == "mlp":
            self.whisper_adapter = nn.Linear(c["whisper_adapter_dim"], width)
        else:
            self.whisper_adapter = Gated(c["whisper_adapter_dim"], c["intermediate_size"], width)
        if c["tie_word_embeddings"]:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(self, tokens, features=None):
        """Tokens int [B, 8, T] local to their stream, features [B, A, E] of speech at positions 1..A, or None.

        Text logits [B, T, text] and audio logits [B, T, 7, audio].
        """
        c, part = self.c, self.transformer
        text, audio = c["text_vocab_size"], c["audio_vocab_size"]
        streams = [part["wte"](tokens[:, k] + text + k * audio) for k in range(7)]
        if features is not None:
            speech = self.whisper_adapter(features)
            for stream in streams:
                stream[:, 1 : 1 + speech.shape[1]] = speech
        x = sum([*streams, part["wte"](tokens[:, 7])]) / 8
        for block in part["h"]:
            x = block(x)
        logits = self.lm_head(part["ln_f"](x))
        sounds = logits[..., text:]
        if c["post_adapter"]:
            for block in part["post_adapter"]:
                x = block(x)
            sounds = part["post_adapter_audio_lm_head"](part["post_adapter_audio_ln"](x))
        return logits[..., :text], sounds.unflatten(-1, (7, audio))
