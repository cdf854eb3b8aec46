"""The encoder of OpenAI's `whisper` in PyTorch, with its names; the file that `whisper.load_model` reads."""

import torch
from torch import nn
from torch.nn import functional


class MultiHeadAttention(nn.Module):
    def __init__(self, state, heads):
        super().__init__()
        self.heads = heads
        self.query, self.value, self.out = (nn.Linear(state, state) for _ in range(3))
        self.key = nn.Linear(state, state, bias=False)

    def forward(self, x):
        q, k, v = (
            layer(x).reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class ResidualAttentionBlock(nn.Module):
    def __init__(self, state, heads):
        super().__init__()
        self.attn, self.attn_ln = MultiHeadAttention(state, heads), nn.LayerNorm(state)
        self.mlp = nn.Sequential(nn.Linear(state, 4 * state), nn.GELU(), nn.Linear(4 * state, state))
        self.mlp_ln = nn.LayerNorm(state)

    def forward(self, x):
        x = x + self.attn(self.attn_ln(x))
        return x + self.mlp(self.mlp_ln(x))


class AudioEncoder(nn.Module):
    def __init__(self, n_mels, n_ctx, n_state, n_head, n_layer):
        super().__init__()
        self.conv1 = nn.Conv1d(n_mels, n_state, 3, padding=1)
        self.conv2 = nn.Conv1d(n_state, n_state, 3, stride=2, padding=1)
        self.register_buffer("positional_embedding", torch.randn(n_ctx, n_state))
        self.blocks = nn.ModuleList(ResidualAttentionBlock(n_state, n_head) for _ in range(n_layer))
        self.ln_post = nn.LayerNorm(n_state)

    def forward(self, mel):
        x = functional.gelu(self.conv2(functional.gelu(self.conv1(mel)))).transpose(1, 2)
        x = x + self.positional_embedding
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x)


class TextDecoder(nn.Module):
    def __init__(self, n_vocab, n_ctx, n_state, n_head, n_layer):
        super().__init__()
        self.token_embedding = nn.Embedding(n_vocab, n_state)
        self.positional_embedding = nn.Parameter(torch.empty(n_ctx, n_state))
        self.blocks = nn.ModuleList(ResidualAttentionBlock(n_state, n_head) for _ in range(n_layer))
        self.ln = nn.LayerNorm(n_state)


class Whisper(nn.Module):
    def __init__(self, dims):
        super().__init__()
        audio, text = (
            {name.replace(f"{kind}_", ""): size for name, size in dims.items() if kind in name}
            for kind in ("audio", "text")
        )
        self.encoder = AudioEncoder(dims["n_mels"], **audio)
        self.decoder = TextDecoder(dims["n_vocab"], **text)


def load_model(file):
    """As OpenAI's: every tensor has to be there."""
    content = torch.load(file, weights_only=True)
    model = Whisper(content["dims"])
    model.load_state_dict(content["model_state_dict"])
    return model.eval()
