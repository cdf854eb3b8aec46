"""What a model is made of and how a run goes: frozen dataclasses, read from YAML and checked field by field.

A wrong value is an error that names the field, what was expected and what was found. Nothing here imports
JAX, so a configuration can be read, checked and printed anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
import yaml
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid")


class ConfigError(ValueError):
    """A configuration that cannot be used: says which file and field, what was expected, what was found."""


@dataclass(frozen=True, config=_STRICT)
class EarConfig:
    """A Whisper encoder. Defaults: whisper-small."""

    mels: int = Field(default=80, gt=0)
    """Mel bins of the log-mel input (M)."""
    width: int = Field(default=768, gt=0)
    layers: int = Field(default=12, gt=0)
    heads: int = Field(default=12, gt=0)
    ffn: int = Field(default=3072, gt=0)
    positions: int = Field(default=1500, gt=0)
    """Feature frames of 20 ms the encoder sees at once; its input is always padded to this length."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> EarConfig:
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width must be even and a multiple of heads, found {self.width} and {self.heads}")
        return self

    @property
    def samples(self) -> int:
        """Longest recording in samples at 16 kHz: two mel frames of 160 samples per position."""
        return self.positions * 320


@dataclass(frozen=True, config=_STRICT)
class AdapterConfig:
    """The bridge from the ear's features to the trunk's embeddings."""

    kind: Literal["llamamlp", "mlp"] = "llamamlp"
    """`llamamlp`: gated SiLU MLP without biases. `mlp`: one affine map."""
    ffn: int = Field(default=4864, gt=0)
    """Hidden width of `llamamlp`."""
    stack: int = Field(default=1, gt=0)
    """Neighbouring feature frames joined into one position. 1 is Mini-Omni."""


@dataclass(frozen=True, config=_STRICT)
class RopeScaling:
    """Llama 3's stretching of the low rope frequencies to longer contexts."""

    factor: float = Field(gt=0)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_context: int = Field(gt=0)

    @model_validator(mode="after")
    def _bands_in_order(self) -> RopeScaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor must be above low_freq_factor, found {self.high_freq_factor} "
                f"and {self.low_freq_factor}"
            )
        return self


@dataclass(frozen=True, config=_STRICT)
class TrunkConfig:
    """A Qwen2- or Llama-family decoder. Defaults: Qwen2-0.5B."""

    width: int = Field(default=896, gt=0)
    layers: int = Field(default=24, gt=0)
    heads: int = Field(default=14, gt=0)
    """Query heads (N)."""
    kv_heads: int = Field(default=2, gt=0)
    """Key/value heads (K); each serves heads/kv_heads query heads."""
    head_size: int = Field(default=64, gt=0)
    ffn: int = Field(default=4864, gt=0)
    rope_theta: float = Field(default=1e6, gt=0)
    rope_scaling: RopeScaling | None = None
    norm_eps: float = Field(default=1e-6, gt=0)
    qkv_bias: bool = True
    tied_head: bool = True
    """Whether the heads use the embedding tables (Qwen2-0.5B) or tables of their own."""
    context: int = Field(default=2048, gt=0)
    """Positions the trunk may attend to, prompt and answer together."""

    @model_validator(mode="after")
    def _heads_divide(self) -> TrunkConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, found {self.heads} and {self.kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_size must be even for rope, found {self.head_size}")
        return self


@dataclass(frozen=True, config=_STRICT)
class VocabConfig:
    """Sizes of the token layout; `omni_jax.vocab` derives every id from them. Defaults: Mini-Omni."""

    text: int = Field(default=151936, gt=0)
    """Rows of the language model's own vocabulary; the text specials follow it."""
    text_specials: int = Field(default=64, ge=6)
    audio: int = Field(default=4096, gt=0)
    """Codes per codebook; each audio layer's specials follow it."""
    audio_specials: int = Field(default=64, ge=5)


@dataclass(frozen=True, config=_STRICT)
class CodecConfig:
    """A SNAC codec. Defaults: snac_24khz."""

    sample_rate: int = Field(default=24000, gt=0)
    encoder_dim: int = Field(default=48, gt=0)
    encoder_rates: tuple[int, ...] = (2, 4, 8, 8)
    decoder_dim: int = Field(default=1024, gt=0)
    decoder_rates: tuple[int, ...] = (8, 8, 4, 2)
    codebook_size: int = Field(default=4096, gt=0)
    codebook_dim: int = Field(default=8, gt=0)
    strides: tuple[int, ...] = (4, 2, 1)
    """Latents per code of each codebook, coarse to fine. Seven codes a frame need (4, 2, 1)."""
    noise: bool = True
    """Whether the decoder has noise blocks (they are silent unless noise is asked for)."""

    @property
    def hop(self) -> int:
        """Samples per latent."""
        hop = 1
        for rate in self.decoder_rates:
            hop *= rate
        return hop

    @property
    def frame(self) -> int:
        """Samples per frame of seven codes."""
        return self.hop * self.strides[0]

    @model_validator(mode="after")
    def _consistent(self) -> CodecConfig:
        hop = 1
        for rate in self.encoder_rates:
            hop *= rate
        if hop != self.hop:
            raise ValueError(
                f"encoder_rates and decoder_rates must multiply to the same hop, found {hop} and {self.hop}"
            )
        if self.strides != (4, 2, 1):
            raise ValueError(f"strides must be (4, 2, 1): seven codes a frame, found {self.strides}")
        return self


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """The whole model. Defaults: Mini-Omni as published."""

    ear: EarConfig = EarConfig()
    adapter: AdapterConfig = AdapterConfig()
    trunk: TrunkConfig = TrunkConfig()
    vocab: VocabConfig = VocabConfig()
    codec: CodecConfig = CodecConfig()
    tts_adapter_layers: int = Field(default=0, ge=0)
    """Blocks after the trunk that serve the audio heads only; 0 means no TTS adapter."""

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
        trunk=TrunkConfig(width=3584, layers=28, heads=28, kv_heads=4, head_size=128, ffn=18944, tied_head=False)
    ),
    "tiny": ModelConfig(
        ear=EarConfig(mels=80, width=32, layers=2, heads=2, ffn=64, positions=100),
        adapter=AdapterConfig(ffn=96),
        trunk=TrunkConfig(width=48, layers=3, heads=4, kv_heads=2, head_size=16, ffn=96, context=192),
        vocab=VocabConfig(text=300, audio=64, text_specials=12, audio_specials=8),
        codec=CodecConfig(
            encoder_dim=8,
            encoder_rates=(2, 4, 8, 8),
            decoder_dim=64,
            decoder_rates=(8, 8, 4, 2),
            codebook_size=64,
        ),
    ),
    "nano": ModelConfig(
        ear=EarConfig(width=192, layers=4, heads=4, ffn=768, positions=300),
        adapter=AdapterConfig(ffn=512, stack=4),
        trunk=TrunkConfig(
            width=256, layers=6, heads=4, kv_heads=2, head_size=64, ffn=1024, rope_theta=1e4, context=512
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
"""Shapes by name. `nano` is that of the small taught model which comes with the package, in `SHIPPED`."""
PRESETS["nano_tts_adapter"] = replace(PRESETS["nano"], tts_adapter_layers=2)
SHIPPED = {"nano": Path(__file__).parent / "assets" / "nano"}
"""Folders of the releases that come with the package, by name."""


TASKS = ("A1A2", "A1T2", "A1T1", "T1A2", "T1T2", "T1A1")
PARTS = (
    "ear",
    "adapter",
    "trunk",
    "text_embedding",
    "audio_embedding",
    "text_head",
    "audio_head",
    "tts_adapter",
)


@dataclass(frozen=True, config=_STRICT)
class SourceConfig:
    """One corpus of spoken exchanges."""

    path: str
    """A folder that `omni_jax.data.records.Writer` has finished."""
    weight: float = Field(default=1.0, gt=0)
    """How often it is drawn, relative to the other sources of the same task."""
    tasks: tuple[str, ...] = TASKS
    """Tasks its exchanges can serve: A1… need question audio, …A… answer codes."""

    @model_validator(mode="after")
    def _known_tasks(self) -> SourceConfig:
        unknown = set(self.tasks) - set(TASKS)
        if unknown or not self.tasks:
            raise ValueError(f"tasks must be some of {', '.join(TASKS)}, found {', '.join(sorted(unknown)) or 'none'}")
        return self


@dataclass(frozen=True, config=_STRICT)
class SpecAugmentConfig:
    """How a recording is varied each time it is heard in training; see `omni_jax.audio.features.spec_augment`."""

    warp: float = Field(default=0.1, ge=0, lt=1)
    """The mel axis is stretched by 1 minus to 1 plus this, as by a longer or shorter throat."""
    stripes: int = Field(default=2, ge=0)
    """Cut out of the time axis, and as many of the mel axis."""
    frames: int = Field(default=10, gt=0)
    """Of the widest stripe of time, 10 ms each."""
    bins: int = Field(default=12, gt=0)
    """Of the widest stripe of the mel axis."""


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """What a run reads, and how it is laid out."""

    sources: tuple[SourceConfig, ...]
    tasks: dict[str, float]
    """Share of examples of each task, in any unit."""
    held_out: tuple[SourceConfig, ...] = ()
    """Never trained on; losses per task and head are reported on them."""
    batch: int = Field(default=8, gt=0)
    """Rows of a step over all devices."""
    length: int = Field(default=2048, gt=0)
    """Positions of a row (T); examples are packed into rows, one that is longer is counted and left out."""
    clips: int = Field(default=8, gt=0)
    """Recordings a row can hold."""
    spec_augment: SpecAugmentConfig | None = None
    """How recordings are varied in training; None leaves them as they are. Where the ear was taught on the same
    recordings it mishears none of them, and what follows it does not learn to cope with an ear that does."""
    code_noise: float = Field(default=0.0, ge=0, lt=1)
    """Share of the codes of its own speech that a model in training reads as others, drawn at random, against exposure
    bias: who only ever read right codes is lost once it has said a wrong one; who can't trust them heeds the words."""
    workers: int = Field(default=2, ge=0)
    """Processes that read and pack ahead; 0 reads in the training process."""
    most_corrupt: int = Field(default=100, ge=0)
    """Records that cannot be read are counted and skipped; more than this many different ones, per process, stop the
    run."""

    @model_validator(mode="after")
    def _served(self) -> DataConfig:
        if not self.sources:
            raise ValueError("sources must name at least one source")
        if not self.tasks:
            raise ValueError("tasks must name at least one task and its share")
        for task, share in self.tasks.items():
            if task not in TASKS or share <= 0:
                raise ValueError(f"tasks must map some of {', '.join(TASKS)} to shares above 0, found {task}: {share}")
            if not any(task in source.tasks for source in self.sources):
                raise ValueError(f"tasks: no source serves {task}")
        return self


@dataclass(frozen=True, config=_STRICT)
class LossConfig:
    """Cross entropy of every head, summed with these weights."""

    text: float = Field(default=1.0, ge=0)
    audio: tuple[float, ...] = (1.0,) * 7
    """One weight per audio layer."""
    z: float = Field(default=0.0, ge=0)
    """Weight of log^2 of the softmax's normaliser, which keeps logits from drifting; 0 leaves it out."""
    chunk: int = Field(default=2048, gt=0)
    """Positions on a device, of all its rows together, whose logits are held at once."""

    @model_validator(mode="after")
    def _seven(self) -> LossConfig:
        if len(self.audio) != 7 or min(self.audio) < 0:
            raise ValueError(f"audio must be 7 weights of 0 or more, found {self.audio}")
        return self


@dataclass(frozen=True, config=_STRICT)
class OptimizerConfig:
    """AdamW, linear warm-up, cosine decay."""

    steps: int = Field(gt=0)
    peak: float = Field(gt=0)
    """Learning rate after the warm-up."""
    final: float = Field(default=0.0, ge=0)
    """Learning rate at the end."""
    warmup: int = Field(default=0, ge=0)
    """Steps."""
    b1: float = Field(default=0.9, ge=0, lt=1)
    b2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    """On matrices only, not on norms and biases."""
    clip: float = Field(default=1.0, gt=0)
    """Largest global norm of the gradient."""
    accumulate: int = Field(default=1, gt=0)
    """Parts a batch is computed in, one after the other, to save memory."""


@dataclass(frozen=True, config=_STRICT)
class MeshConfig:
    """Devices along each mesh axis. `data: -1` takes all that the other two leave."""

    data: int = Field(default=-1, ge=-1)
    fsdp: int = Field(default=1, gt=0)
    tensor: int = Field(default=1, gt=0)


@dataclass(frozen=True, config=_STRICT)
class CheckpointConfig:
    """When a run saves itself and what it keeps."""

    every: int = Field(default=500, gt=0)
    """Steps."""
    keep: int = Field(default=3, gt=0)
    """Newest checkpoints to keep."""
    keep_every: int | None = Field(default=None, gt=0)
    """Besides, keep every checkpoint at a multiple of this many steps."""


@dataclass(frozen=True, config=_STRICT)
class RunConfig:
    """One stage of training: what learns, on what, how, from where to where."""

    out: str
    """Folder of the run: checkpoints, metrics, and at the end `release`."""
    start: str
    """Release folder to start from, `preset:NAME` for random weights, or the run folder of an earlier stage."""
    learn: tuple[str, ...]
    """Parts that learn; the rest gets no gradient, no moments, no update."""
    data: DataConfig
    optimizer: OptimizerConfig
    loss: LossConfig = LossConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    remat: Literal["none", "dots", "full"] = "full"
    """What the backward pass computes again: nothing, all but matrix products, or whole blocks."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; parameters are float32. `auto`: bfloat16, on CPU float32."""
    log_every: int = Field(default=10, gt=0)
    """Steps; only then does the host wait for the device."""
    evaluate_every: int | None = Field(default=None, gt=0)
    """Steps between evaluations on `data.held_out`; None: only at the end."""
    samples: int = Field(default=2, ge=0)
    """Held-out questions answered aloud at each evaluation."""
    most_skipped: int = Field(default=10, gt=0)
    """Steps in a row whose loss is not finite, each skipped, before the run stops."""
    seed: int = Field(default=0, ge=0)
    wandb: str | None = None
    """Project to log to, where the package is installed."""

    @model_validator(mode="after")
    def _known_parts(self) -> RunConfig:
        unknown = set(self.learn) - set(PARTS)
        if unknown or not self.learn:
            raise ValueError(f"learn must be some of {', '.join(PARTS)}, found {', '.join(sorted(unknown)) or 'none'}")
        if self.data.batch % self.optimizer.accumulate:
            raise ValueError(
                "data.batch must be a multiple of optimizer.accumulate, "
                f"found {self.data.batch} and {self.optimizer.accumulate}"
            )
        return self


Config = TypeVar("Config")


def build(cls: type[Config], values: Any, source: str) -> Config:
    """Check nested plain values (as YAML gives them) against a config dataclass.

    Args:
        cls: the config dataclass to build.
        values: nested dicts, lists and scalars.
        source: where the values come from, for the error message.

    Raises:
        ConfigError: one line per wrong field, with its dotted name, what was expected and what was found.
    """
    try:
        return pydantic.TypeAdapter(cls).validate_python(values)
    except pydantic.ValidationError as error:
        lines = []
        for item in error.errors():
            field = ".".join(str(part) for part in item["loc"]) or "(whole)"
            found = f", found {item['input']!r}" if item["loc"] else ""
            lines.append(f"{source}: {field}: {item['msg']}{found}")
        raise ConfigError("\n".join(lines)) from None


def plain(config: Any) -> Any:
    """A config as nested dicts, lists and scalars, ready for YAML or JSON."""
    return pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")


def load(cls: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config from a YAML file, with `field.sub=value` overrides applied on top.

    Raises:
        ConfigError: the file is not there, is not YAML, or a field is wrong.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable file, found {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected YAML, found {error}") from None
    if values is None:
        values = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ConfigError(f"override {override!r}: expected field=value")
        node = values
        *parents, last = name.split(".")
        for part in parents:
            if isinstance(node, dict) and node.get(part) is None:
                node[part] = {}
            node = node[part] if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {name} is not a field that has parts")
        try:
            node[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: expected a YAML value, found {error}") from None
    return build(cls, values, str(path))


def save(config: Any, path: str | Path) -> None:
    """Write a config as YAML."""
    Path(path).write_text(yaml.safe_dump(plain(config), sort_keys=False), encoding="utf-8")
