"""Model shapes and presets. Dimension names are those of Hugging Face configs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid")
"""Unknown fields are errors."""


@dataclass(frozen=True, config=STRICT)
class AudioEncoderConfig:
    """A Whisper encoder. Defaults: whisper-small."""

    num_mel_bins: int = Field(default=80, gt=0)
    """Mel bins of the log-mel input (M)."""
    hidden_size: int = Field(default=768, gt=0)
    num_layers: int = Field(default=12, gt=0)
    num_heads: int = Field(default=12, gt=0)
    intermediate_size: int = Field(default=3072, gt=0)
    max_position: int = Field(default=1500, gt=0)
    """Feature frames of 20 ms that the encoder takes at once; a shorter recording is padded."""
    mask_padding: bool = False
    """Whether only the recording is attended to, not the silence that it is padded with. Its features are then the same
    whatever it is padded to, and a short recording costs less. Whisper was trained without."""

    @model_validator(mode="after")
    def _heads_divide_hidden_size(self) -> AudioEncoderConfig:
        if self.hidden_size % self.num_heads or self.hidden_size % 2:
            raise ValueError(
                f"hidden_size must be even and a multiple of num_heads, found {self.hidden_size} and {self.num_heads}"
            )
        return self

    @property
    def windows(self) -> tuple[int, ...]:
        """Positions that recordings are padded to: with `mask_padding` a quarter, a half or all of them."""
        shorter = (self.max_position // 4, self.max_position // 2) if self.mask_padding else ()
        return (*shorter, self.max_position)

    def window(self, samples: int) -> int:
        """The shortest of `windows` for a recording of so many samples.

        It has one position more than the recording, since the convolutions look ahead.
        """
        return next((size for size in self.windows if samples // 320 + 2 <= size), self.max_position)

    @property
    def max_samples(self) -> int:
        """Longest recording in samples at 16 kHz: two mel frames of 160 samples per position."""
        return self.max_position * 320


@dataclass(frozen=True, config=STRICT)
class AdapterConfig:
    """The module between the audio encoder's features and the trunk's embeddings."""

    kind: Literal["llamamlp", "mlp"] = "llamamlp"
    """`llamamlp`: gated SiLU MLP without biases. `mlp`: one affine map."""
    intermediate_size: int = Field(default=4864, gt=0)
    """Hidden units of `llamamlp`."""
    stack: int = Field(default=1, gt=0)
    """Consecutive feature frames stacked into one position. Mini-Omni: 1."""


@dataclass(frozen=True, config=STRICT)
class RopeScaling:
    """Llama 3's scaling of the low rope frequencies to longer contexts."""

    factor: float = Field(gt=0)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_max_position: int = Field(gt=0)

    @model_validator(mode="after")
    def _bands_in_order(self) -> RopeScaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor must be above low_freq_factor, found {self.high_freq_factor} "
                f"and {self.low_freq_factor}"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class TrunkConfig:
    """A Qwen2- or Llama-family decoder. Defaults: Qwen2-0.5B."""

    hidden_size: int = Field(default=896, gt=0)
    num_layers: int = Field(default=24, gt=0)
    num_heads: int = Field(default=14, gt=0)
    """Query heads (N)."""
    num_kv_heads: int = Field(default=2, gt=0)
    """Key/value heads (K); each serves num_heads / num_kv_heads query heads."""
    head_dim: int = Field(default=64, gt=0)
    intermediate_size: int = Field(default=4864, gt=0)
    rope_theta: float = Field(default=1e6, gt=0)
    rope_scaling: RopeScaling | None = None
    norm_eps: float = Field(default=1e-6, gt=0)
    qkv_bias: bool = True
    tie_word_embeddings: bool = True
    """Whether the heads use the embedding tables (Qwen2-0.5B) or tables of their own."""
    max_position: int = Field(default=2048, gt=0)
    """Length of the context: positions the trunk may attend to, prompt and answer together."""

    @model_validator(mode="after")
    def _heads_divide(self) -> TrunkConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, found {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rope, found {self.head_dim}")
        return self


@dataclass(frozen=True, config=STRICT)
class VocabConfig:
    """Sizes of the token layout; `omni_jax.vocab` derives every id from them. Defaults: Mini-Omni."""

    text: int = Field(default=151936, gt=0)
    """Rows of the language model's own vocabulary; the text specials follow it."""
    text_specials: int = Field(default=64, ge=6)
    audio: int = Field(default=4096, gt=0)
    """Codes per codebook; each codebook's specials follow it."""
    audio_specials: int = Field(default=64, ge=5)


@dataclass(frozen=True, config=STRICT)
class CodecConfig:
    """A SNAC codec. Defaults: snac_24khz."""

    sample_rate: int = Field(default=24000, gt=0)
    encoder_dim: int = Field(default=48, gt=0)
    encoder_rates: tuple[int, ...] = (2, 4, 8, 8)
    decoder_dim: int = Field(default=1024, gt=0)
    decoder_rates: tuple[int, ...] = (8, 8, 4, 2)
    codebook_size: int = Field(default=4096, gt=0)
    codebook_dim: int = Field(default=8, gt=0)
    vq_strides: tuple[int, ...] = (4, 2, 1)
    """Latents per code of each codebook, coarse to fine. Seven codes a frame need (4, 2, 1)."""
    noise: bool = True
    """Whether the decoder has the weights of noise blocks. They are kept for export; decoding adds no noise."""

    @property
    def hop_length(self) -> int:
        """Samples per latent."""
        return math.prod(self.decoder_rates)

    @property
    def frame_size(self) -> int:
        """Samples per frame of seven codes."""
        return self.hop_length * self.vq_strides[0]

    @model_validator(mode="after")
    def _consistent(self) -> CodecConfig:
        encoder_hop = math.prod(self.encoder_rates)
        if encoder_hop != self.hop_length:
            raise ValueError(
                "encoder_rates and decoder_rates must multiply to the same hop length, "
                f"found {encoder_hop} and {self.hop_length}"
            )
        if self.vq_strides != (4, 2, 1):
            raise ValueError(f"vq_strides must be (4, 2, 1): seven codes a frame, found {self.vq_strides}")
        return self


@dataclass(frozen=True, config=STRICT)
class AudioConfig:
    """How a recording is prepared before the audio encoder; see `omni_jax.audio.vad`."""

    find_speech: bool = False
    """Whether what precedes and follows the speech is removed, and a recording without speech is not answered."""
    level: float | None = Field(default=None, le=0)
    """Level in dB of full scale that the speech of every recording is brought to. None: it stays as it is."""


@dataclass(frozen=True, config=STRICT)
class TextConfig:
    """How the text of a request is prepared. Unicode is cleaned up always; see `omni_jax.text`."""

    spoken_english: bool = False
    """Whether numbers, symbols, abbreviations and Markdown become English words, for models that know only words."""
    names: tuple[str, ...] = ()
    """With `spoken_english`: words that have a capital letter wherever they stand, such as `Paris`."""
    max_words: int | None = Field(default=None, gt=0)
    """Words that are read aloud at once (T1A1): longer texts are read sentence by sentence. None: any number."""

    @model_validator(mode="after")
    def _names_need_spoken_english(self) -> TextConfig:
        if self.names and not self.spoken_english:
            raise ValueError("names need spoken_english")
        if not all(name.strip() for name in self.names):
            raise ValueError("names must not be empty")
        return self


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The whole model. Defaults: Mini-Omni as published."""

    audio_encoder: AudioEncoderConfig = AudioEncoderConfig()
    adapter: AdapterConfig = AdapterConfig()
    trunk: TrunkConfig = TrunkConfig()
    vocab: VocabConfig = VocabConfig()
    codec: CodecConfig = CodecConfig()
    audio: AudioConfig = AudioConfig()
    text: TextConfig = TextConfig()
    tts_adapter_layers: int = Field(default=0, ge=0)
    """Blocks after the trunk that serve the audio heads only; 0 means no TTS adapter."""
    conversation: bool = False
    """Whether it was trained on conversations: it takes a system text and past turns before the present one."""

    @model_validator(mode="after")
    def _has_system_token(self) -> ModelConfig:
        if self.conversation and self.vocab.text_specials < 7:
            raise ValueError(
                "conversation needs vocab.text_specials of 7 or more: the seventh begins a system text, "
                f"found {self.vocab.text_specials}"
            )
        return self

    @model_validator(mode="after")
    def _one_codebook_size(self) -> ModelConfig:
        if self.vocab.audio != self.codec.codebook_size:
            raise ValueError(
                f"vocab.audio must equal codec.codebook_size, found {self.vocab.audio} and {self.codec.codebook_size}"
            )
        return self


PRESETS: dict[str, ModelConfig] = {
    "mini_omni": ModelConfig(),
    "mini_omni_tts_adapter": ModelConfig(tts_adapter_layers=6),
    "mini_omni_7b": ModelConfig(
        trunk=TrunkConfig(
            hidden_size=3584,
            num_layers=28,
            num_heads=28,
            num_kv_heads=4,
            head_dim=128,
            intermediate_size=18944,
            tie_word_embeddings=False,
        )
    ),
    "tiny": ModelConfig(
        audio_encoder=AudioEncoderConfig(
            num_mel_bins=80, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, max_position=100
        ),
        adapter=AdapterConfig(intermediate_size=96),
        trunk=TrunkConfig(
            hidden_size=48,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            intermediate_size=96,
            max_position=192,
        ),
        vocab=VocabConfig(text=300, audio=64, text_specials=12, audio_specials=8),
        codec=CodecConfig(
            encoder_dim=8,
            encoder_rates=(16, 32),
            decoder_dim=32,
            decoder_rates=(32, 16),
            codebook_size=64,
        ),
    ),
    "nano": ModelConfig(
        audio_encoder=AudioEncoderConfig(
            hidden_size=512,
            num_layers=6,
            num_heads=8,
            intermediate_size=2048,
            max_position=500,
            mask_padding=True,
        ),
        adapter=AdapterConfig(intermediate_size=512, stack=4),
        trunk=TrunkConfig(
            hidden_size=256,
            num_layers=6,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            intermediate_size=1024,
            rope_theta=1e4,
            max_position=512,
        ),
        vocab=VocabConfig(text=1024, audio=512, text_specials=64, audio_specials=64),
        # Two thirds of a codec's time go into its layers at 24 kHz: few channels there, many where they cost nothing.
        codec=CodecConfig(
            encoder_dim=8,
            encoder_rates=(8, 4, 4, 4),
            decoder_dim=512,
            decoder_rates=(2, 2, 2, 2, 4, 8),
            codebook_size=512,
            noise=False,
        ),
    ),
}
"""Shapes by name. `nano` is that of the small trained model which ships with the package."""
SHIPPED_RELEASES = {"nano": Path(__file__).parents[1] / "assets" / "nano"}
"""Folders of the releases that ship with the package, by name."""
