"""Model shapes and presets. Dimension names are those of Hugging Face configs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeAlias

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""Unknown fields are errors, and so are NaN and infinity."""

MAX_LAYERS = 1024
MAX_SIZE = 1 << 20
"""Most hidden units and rows of a vocabulary. The largest of published models: 53,248 units, 262,144 rows."""
MAX_HEADS = 1024
"""Most heads, and most elements of a head."""
MAX_POSITION = 1 << 24
"""Longest context, in positions; of published models 10 million."""
MAX_AUDIO_POSITION = 1 << 16
"""Longest window of the audio encoder, in positions of 20 ms: 22 minutes. Its cost grows with the square."""
MAX_SPECIALS = 1 << 16
MAX_SAMPLE_RATE = 1 << 20
MAX_CODEC_STAGES = 16
MAX_CODEC_RATE = 1024
MAX_STACK = 64
MAX_MEL_BINS = 1024


@dataclass(frozen=True, config=STRICT)
class AudioEncoderConfig:
    """A Whisper encoder. Defaults: whisper-small."""

    num_mel_bins: int = Field(default=80, gt=0, le=MAX_MEL_BINS)
    """Mel bins of the log-mel input (M)."""
    hidden_size: int = Field(default=768, gt=0, le=MAX_SIZE)
    num_layers: int = Field(default=12, gt=0, le=MAX_LAYERS)
    num_heads: int = Field(default=12, gt=0, le=MAX_HEADS)
    intermediate_size: int = Field(default=3072, gt=0, le=MAX_SIZE)
    max_position: int = Field(default=1500, gt=0, le=MAX_AUDIO_POSITION)
    """Feature frames of 20 ms that the encoder takes at once; a shorter recording is padded."""
    mask_padding: bool = False
    """Whether only the recording is attended to, not the silence that it is padded with. Its features are then the same
    whatever it is padded to, and a short recording costs less. Whisper was trained without."""
    short_windows: bool = False
    """Whether a short recording is padded to a quarter or a half of `max_position` only, and costs less. Its features
    are then those before a shorter silence. Whisper was trained without, and training here always pads to all of it.
    With `mask_padding` the shorter windows are always used."""

    @model_validator(mode="after")
    def _heads_divide_hidden_size(self) -> AudioEncoderConfig:
        if self.hidden_size % self.num_heads or self.hidden_size % 2:
            raise ValueError(
                f"hidden_size must be even and a multiple of num_heads, found {self.hidden_size} and {self.num_heads}"
            )
        return self

    @property
    def windows(self) -> tuple[int, ...]:
        """Positions that recordings are padded to: a quarter, a half or all of them; or always all."""
        has_shorter = self.mask_padding or self.short_windows
        shorter = (self.max_position // 4, self.max_position // 2) if has_shorter else ()
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
    intermediate_size: int = Field(default=4864, gt=0, le=MAX_SIZE)
    """Hidden units of `llamamlp`."""
    stack: int = Field(default=1, gt=0, le=MAX_STACK)
    """Consecutive feature frames stacked into one position. Mini-Omni: 1."""


ROPE_FIELDS = {
    "llama3": ("original_max_position", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_position", "beta_fast", "beta_slow", "attention_factor"),
    "linear": (),
    "longrope": ("original_max_position", "short_factor", "long_factor", "attention_factor"),
}
"""The fields of `RopeScaling` that each kind needs besides `factor`; it has no others."""


@dataclass(frozen=True, config=STRICT)
class RopeScaling:
    """How rope frequencies are changed for contexts longer than the original one."""

    factor: float = Field(gt=0)
    """How many times as long the context is."""
    kind: Literal["llama3", "yarn", "linear", "longrope"] = "llama3"
    """`linear`: every frequency is divided by `factor`. `llama3`: the low ones (Llama 3.1). `yarn`: arXiv 2309.00071.
    `longrope`: a divisor for each (arXiv 2402.13753), of which only those for the original context are used."""
    original_max_position: int | None = Field(default=None, gt=0, le=MAX_POSITION)
    low_freq_factor: float | None = Field(default=None, gt=0)
    high_freq_factor: float | None = Field(default=None, gt=0)
    beta_fast: float | None = Field(default=None, gt=0)
    beta_slow: float | None = Field(default=None, gt=0)
    attention_factor: float | None = Field(default=None, gt=0)
    """What rotated queries and keys are multiplied with."""
    short_factor: tuple[float, ...] | None = None
    """Divisors of the frequencies within the original context."""
    long_factor: tuple[float, ...] | None = None
    """Divisors beyond it; kept for export."""

    @model_validator(mode="after")
    def _fields_of_the_kind(self) -> RopeScaling:
        needed = ROPE_FIELDS[self.kind]
        for name in dict.fromkeys(name for names in ROPE_FIELDS.values() for name in names):
            value = getattr(self, name)
            if (value is None) == (name in needed):
                expected = "a value" if name in needed else "none"
                raise ValueError(f"{name}: expected {expected} with kind {self.kind}, found {value}")
        if self.low_freq_factor and self.high_freq_factor and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor must be above low_freq_factor, found {self.high_freq_factor} "
                f"and {self.low_freq_factor}"
            )
        return self


class LayerKind(NamedTuple):
    """How the attention of a layer differs from that of others; all layers have the same weights."""

    rope: bool
    """Whether queries and keys are rotated."""
    sliding: bool
    """Whether it attends to the last `sliding_window` positions only."""


FULL_ATTENTION = LayerKind(rope=True, sliding=False)
"""The kind of most layers."""


@dataclass(frozen=True, config=STRICT)
class TrunkConfig:
    """A decoder of one of the families in docs/weights.md. Defaults: Qwen2-0.5B."""

    family: str | None = None
    """The `model_type` of transformers that it was imported as and is exported as; the model does not depend on it.
    None: `qwen2` with biases, `llama` without."""
    hidden_size: int = Field(default=896, gt=0, le=MAX_SIZE)
    num_layers: int = Field(default=24, gt=0, le=MAX_LAYERS)
    num_heads: int = Field(default=14, gt=0, le=MAX_HEADS)
    """Query heads (N)."""
    num_kv_heads: int = Field(default=2, gt=0, le=MAX_HEADS)
    """Key/value heads (K); each serves num_heads / num_kv_heads query heads."""
    head_dim: int = Field(default=64, gt=0, le=MAX_HEADS)
    intermediate_size: int = Field(default=4864, gt=0, le=MAX_SIZE)
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh"] = "silu"
    """Activation of the MLPs, as transformers names it."""
    rope_theta: float = Field(default=1e6, gt=0)
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = Field(default=1.0, gt=0, le=1)
    """Share of each head that rope rotates, from the front."""
    no_rope_layers: tuple[int, ...] = ()
    """Layers without rope, counted from 0 (SmolLM3)."""
    sliding_window: int | None = Field(default=None, gt=0, le=MAX_POSITION)
    """Positions that `sliding_layers` attend to, their own included."""
    sliding_layers: tuple[int, ...] = ()
    """Layers, counted from 0, that attend to `sliding_window` positions; the others attend to all before them."""
    rope_local_theta: float | None = Field(default=None, gt=0)
    """`rope_theta` of the sliding layers, which then have no `rope_scaling` (Gemma 3). None: as in the others."""
    norm_eps: float = Field(default=1e-6, gt=0)
    norm_unit_offset: bool = False
    """Whether norms multiply with one plus their weight (Gemma)."""
    norms_before: bool = True
    """Whether attention and MLP read normed hidden states."""
    norms_after: bool = False
    """Whether what attention and MLP add to the hidden states is normed (Gemma 2, OLMo 2)."""
    qk_norm: Literal["head", "projection"] | None = None
    """Norms of queries and keys: of each head (Qwen3) or of all heads together (OLMo 2)."""
    qkv_bias: bool = True
    out_bias: bool = False
    """Whether the output projection of attention has a bias."""
    mlp_bias: bool = False
    attention_scale: float | None = Field(default=None, gt=0)
    """What products of queries and keys are multiplied with; None: 1 / sqrt(head_dim)."""
    attention_softcap: float | None = Field(default=None, gt=0)
    """Bound of attention's scores s, which become softcap * tanh(s / softcap) (Gemma 2)."""
    embedding_multiplier: float = Field(default=1.0, gt=0)
    """What token embeddings are multiplied with (Gemma, Granite)."""
    residual_multiplier: float = Field(default=1.0, gt=0)
    """What attention and MLP add to the hidden states is multiplied with it (Granite)."""
    logits_scaling: float = Field(default=1.0, gt=0)
    """What the logits of all heads are divided by (Granite)."""
    logits_softcap: float | None = Field(default=None, gt=0)
    """Bound of the logits of all heads, as `attention_softcap`."""
    tie_word_embeddings: bool = True
    """Whether the heads use the embedding tables (Qwen2-0.5B) or tables of their own."""
    max_position: int = Field(default=2048, gt=0, le=MAX_POSITION)
    """Length of the context: positions the trunk may attend to, prompt and answer together."""

    @model_validator(mode="after")
    def _consistent(self) -> TrunkConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, found {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rope, found {self.head_dim}")
        if self.rotary_dim % 2 or not self.rotary_dim:
            raise ValueError(
                f"head_dim * partial_rotary_factor must be even for rope, found {self.head_dim} * "
                f"{self.partial_rotary_factor}"
            )
        for name in ("no_rope_layers", "sliding_layers"):
            if wrong := [layer for layer in getattr(self, name) if not 0 <= layer < self.num_layers]:
                raise ValueError(f"{name}: expected layers from 0 to {self.num_layers - 1}, found {wrong}")
        if self.sliding_layers and self.sliding_window is None:
            raise ValueError("sliding_layers need a sliding_window")
        if not (self.norms_before or self.norms_after):
            raise ValueError("expected norms_before, norms_after or both, found neither")
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "longrope":
            assert scaling.short_factor is not None
            assert scaling.original_max_position is not None
            if len(scaling.short_factor) != self.rotary_dim // 2:
                raise ValueError(
                    f"rope_scaling.short_factor: expected {self.rotary_dim // 2} numbers, "
                    f"found {len(scaling.short_factor)}"
                )
            if self.max_position > scaling.original_max_position:
                raise ValueError(
                    f"max_position: expected at most rope_scaling.original_max_position, "
                    f"{scaling.original_max_position}, found {self.max_position}"
                )
        return self

    @property
    def rotary_dim(self) -> int:
        """Numbers of each head that rope rotates."""
        return int(self.head_dim * self.partial_rotary_factor)

    def layer_kind(self, layer: int) -> LayerKind:
        """How the attention of a layer differs from that of others."""
        return LayerKind(layer not in self.no_rope_layers, layer in self.sliding_layers)


@dataclass(frozen=True, config=STRICT)
class VocabConfig:
    """Sizes of the token layout; `omni_jax.vocab` derives every id from them. Defaults: Mini-Omni."""

    text: int = Field(default=151936, gt=0, le=MAX_SIZE)
    """Rows of the language model's own vocabulary; the text specials follow it."""
    text_specials: int = Field(default=64, ge=6, le=MAX_SPECIALS)
    audio: int = Field(default=4096, gt=0, le=MAX_SIZE)
    """Codes per codebook; each codebook's specials follow it."""
    audio_specials: int = Field(default=64, ge=5, le=MAX_SPECIALS)


Rate: TypeAlias = Annotated[int, Field(gt=0, le=MAX_CODEC_RATE)]
"""Samples that a stage of the codec makes one of, or of one."""


@dataclass(frozen=True, config=STRICT)
class CodecConfig:
    """A SNAC codec. Defaults: snac_24khz."""

    sample_rate: int = Field(default=24000, gt=0, le=MAX_SAMPLE_RATE)
    encoder_dim: int = Field(default=48, gt=0, le=MAX_SIZE)
    encoder_rates: tuple[Rate, ...] = Field(default=(2, 4, 8, 8), min_length=1, max_length=MAX_CODEC_STAGES)
    decoder_dim: int = Field(default=1024, gt=0, le=MAX_SIZE)
    decoder_rates: tuple[Rate, ...] = Field(default=(8, 8, 4, 2), min_length=1, max_length=MAX_CODEC_STAGES)
    codebook_size: int = Field(default=4096, gt=0, le=MAX_SIZE)
    codebook_dim: int = Field(default=8, gt=0, le=MAX_SIZE)
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
        if self.hop_length > MAX_SIZE:
            raise ValueError(f"decoder_rates must multiply to at most {MAX_SIZE} samples, found {self.hop_length}")
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
    tts_adapter_layers: int = Field(default=0, ge=0, le=MAX_LAYERS)
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

    def with_short_windows(self) -> ModelConfig:
        """The same with `audio_encoder.short_windows`."""
        return replace(self, audio_encoder=replace(self.audio_encoder, short_windows=True))


def _of_trunk(trunk: TrunkConfig, text: int = 151936) -> ModelConfig:
    """Mini-Omni with another language model, as `omni-jax convert init` makes it; `text` rows of its vocabulary."""
    adapter = AdapterConfig(intermediate_size=trunk.intermediate_size)
    return ModelConfig(adapter=adapter, trunk=trunk, vocab=VocabConfig(text=text))


_QWEN3 = TrunkConfig(
    family="qwen3",
    hidden_size=1024,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=3072,
    qk_norm="head",
    qkv_bias=False,
)

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
    "qwen3_0_6b": _of_trunk(_QWEN3),
    "qwen3_1_7b": _of_trunk(replace(_QWEN3, hidden_size=2048, intermediate_size=6144)),
    "qwen3_8b": _of_trunk(
        replace(
            _QWEN3,
            hidden_size=4096,
            num_layers=36,
            num_heads=32,
            intermediate_size=12288,
            tie_word_embeddings=False,
        )
    ),
    "llama3_2_1b": _of_trunk(
        TrunkConfig(
            family="llama",
            hidden_size=2048,
            num_layers=16,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            intermediate_size=8192,
            rope_theta=5e5,
            rope_scaling=RopeScaling(
                factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
            ),
            norm_eps=1e-5,
            qkv_bias=False,
        ),
        text=128256,
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
