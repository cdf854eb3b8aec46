"""The reference in PyTorch: a transformers Qwen2 of the same shape, with its static cache and the eight heads."""

from __future__ import annotations

import torch
from transformers import Qwen2Config, Qwen2Model, StaticCache

from omni_jax.config.model import ModelConfig
from omni_jax.vocab import Vocab


class TorchOmni:
    """Trunk and one head of 181120 rows, random weights, float32, as the published PyTorch code runs them."""

    def __init__(self, config: ModelConfig, max_len: int):
        trunk, vocab = config.trunk, Vocab(config.vocab)
        self.config = Qwen2Config(
            vocab_size=1,
            hidden_size=trunk.hidden_size,
            intermediate_size=trunk.intermediate_size,
            num_hidden_layers=trunk.num_layers,
            num_attention_heads=trunk.num_heads,
            num_key_value_heads=trunk.num_kv_heads,
            max_position_embeddings=trunk.max_position,
            rms_norm_eps=trunk.norm_eps,
        )
        torch.manual_seed(0)
        self.trunk = Qwen2Model(self.config).eval()
        self.table = torch.randn(vocab.rows, trunk.hidden_size) / trunk.hidden_size**0.5
        self.max_len = max_len
        self.text_rows = vocab.text_rows
        self.audio_shape = (7, vocab.audio_rows)
        self.offsets = vocab.text_rows + torch.arange(7) * vocab.audio_rows

    @torch.inference_mode()
    def start(self, rows: int, prompt: int) -> None:
        """Prefill `rows` prompts of `prompt` positions; all positions go through the head."""
        self.cache = StaticCache(config=self.config, max_cache_len=self.max_len)
        self.position = 0
        self._forward(torch.randn(rows, prompt, self.config.hidden_size))

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One step of every row through both heads: int [rows, 8] -> int [rows, 8]."""
        ids = torch.cat([tokens[:, :7] + self.offsets, tokens[:, 7:]], dim=1)
        return self._forward(self.table[ids].mean(1, keepdim=True))

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(self.position, self.position + x.shape[1])
        hidden = self.trunk(
            inputs_embeds=x,
            past_key_values=self.cache,
            position_ids=positions[None].expand(x.shape[0], -1),
            use_cache=True,
        ).last_hidden_state
        self.position += x.shape[1]
        logits = (hidden @ self.table.T)[:, -1]
        text = logits[:, : self.text_rows].argmax(-1, keepdim=True)
        audio = logits[:, self.text_rows :].reshape(-1, *self.audio_shape).argmax(-1)
        return torch.cat([audio, text], dim=1)
