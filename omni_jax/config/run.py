"""The configuration of a training run. `docs/run_config.md` is generated from these docstrings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from omni_jax.config.model import MAX_MEL_BINS, MAX_POSITION, MAX_SIZE, STRICT
from omni_jax.tasks import Task

MAX_BATCH_SIZE = 1 << 20
"""Most rows of a step."""
MAX_DEVICES = 1 << 20
MAX_STEPS = 1 << 40
MAX_WORKERS = 1024
"""Most processes that read data."""
MAX_SEED = (1 << 63) - 1

MODULES = (
    "audio_encoder",
    "adapter",
    "trunk",
    "text_embedding",
    "audio_embedding",
    "text_head",
    "audio_head",
    "tts_adapter",
)
"""Names of the modules that a stage can train."""

LORA = "lora"
"""The module that the parameters of `LoRAConfig` form, which is trained where there is one. A run has it in PEFT's
format in the folder of this name."""

MIN_ALPHA, MAX_ALPHA = 1e-6, 1e6
"""Of LoRA: far from any that is used; the scales that follow from them are numbers of float32."""

PROJECTIONS = ("q", "k", "v", "out", "gate", "up", "down")
"""Linear maps of each layer of the trunk: four of its attention, three of its MLP."""


@dataclass(frozen=True, config=STRICT)
class SourceConfig:
    """One corpus of spoken exchanges."""

    path: str
    """A folder of records, as `omni-jax prepare` writes it."""
    weight: float = Field(default=1.0, gt=0)
    """How often it is drawn, relative to the other sources of the same task."""
    tasks: tuple[str, ...] = tuple(Task)
    """Tasks its exchanges can serve: A1… need question audio, …A… answer codes."""

    @model_validator(mode="after")
    def _known_tasks(self) -> SourceConfig:
        unknown = set(self.tasks) - set(Task)
        if unknown or not self.tasks:
            raise ValueError(f"tasks must be some of {', '.join(Task)}, found {', '.join(sorted(unknown)) or 'none'}")
        return self


@dataclass(frozen=True, config=STRICT)
class SpecAugmentConfig:
    """Augmentation of log-mel features in training; see `omni_jax.audio.features.spec_augment`."""

    max_warp: float = Field(default=0.1, ge=0, lt=1)
    """Vocal tract length perturbation: the mel axis is stretched by a factor of 1 minus to 1 plus this."""
    num_masks: int = Field(default=2, ge=0, le=MAX_BATCH_SIZE)
    """Masks along the time axis, and as many along the mel axis."""
    max_time_mask: int = Field(default=10, gt=0, le=MAX_POSITION)
    """Width of the widest time mask, in frames of 10 ms."""
    max_mel_mask: int = Field(default=12, gt=0, le=MAX_MEL_BINS)
    """Width of the widest mel mask, in bins."""


@dataclass(frozen=True, config=STRICT)
class CachedFeaturesConfig:
    """Features of the frozen audio encoder, computed before the first step and stored: no step runs the encoder."""

    path: str
    """Folder of the features, one folder in it for each source. Runs with the same audio encoder share it; what is
    there is not computed again."""
    versions: int = Field(default=1, gt=0, le=MAX_BATCH_SIZE)
    """Of each question: the recording as it is, and augmented ones (`omni_jax.audio.augment.augment`)."""
    dtype: Literal["float32", "float16", "int8"] = "float16"
    """How they are stored. int8 has a scale for each frame."""


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """What a run reads, and how it is packed."""

    sources: tuple[SourceConfig, ...]
    """Corpora to train on."""
    tasks: dict[str, float]
    """Share of examples of each task, in any unit."""
    held_out: tuple[SourceConfig, ...] = ()
    """Corpora that are never trained on; losses per task and head are reported on them. Fields as in `sources`."""
    batch_size: int = Field(default=8, gt=0, le=MAX_BATCH_SIZE)
    """Rows of a step over all devices."""
    max_length: int = Field(default=2048, gt=0, le=MAX_POSITION)
    """Positions of a row (T); examples are packed into rows, one that is longer is counted and left out."""
    max_clips: int = Field(default=8, gt=0, le=MAX_BATCH_SIZE)
    """Recordings that fit into a row."""
    spec_augment: SpecAugmentConfig | None = None
    """Augmentation of recordings in training; None leaves them as they are. Useful where the audio encoder was
    trained on the same recordings: it makes no mistakes on them, so the trunk would not learn to cope with any."""
    cached_features: CachedFeaturesConfig | None = None
    """Store the audio encoder's features instead of running it in each step; it must be frozen."""
    audio_token_noise: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a code of the model's own speech is replaced by a random code in the input (not in the
    targets). Against exposure bias: in decoding the model reads its own, sometimes wrong, codes."""
    num_workers: int = Field(default=2, ge=0, le=MAX_WORKERS)
    """Processes that read and pack ahead; 0 reads in the training process."""
    max_corrupt: int = Field(default=100, ge=0)
    """Records that cannot be read are counted and skipped; more than this many different ones, per process, stop the
    run."""

    @model_validator(mode="after")
    def _served(self) -> DataConfig:
        if not self.sources:
            raise ValueError("sources must name at least one source")
        if not self.tasks:
            raise ValueError("tasks must name at least one task and its share")
        if self.spec_augment and self.cached_features:
            raise ValueError("spec_augment needs recordings, which cached_features replaces: expected one of them")
        for task, share in self.tasks.items():
            if task not in set(Task) or share <= 0:
                raise ValueError(f"tasks must map some of {', '.join(Task)} to shares above 0, found {task}: {share}")
            if not any(task in source.tasks for source in self.sources):
                raise ValueError(f"tasks: no source serves {task}")
        return self


@dataclass(frozen=True, config=STRICT)
class LoRAConfig:
    """Low-rank adaptation of the trunk (arXiv 2106.09685).

    Its weights W are frozen, and W + alpha / rank * B A is used in their place, of which A and B are trained.
    """

    rank: int = Field(default=16, gt=0, le=MAX_SIZE)
    """Rows of A and columns of B."""
    alpha: float = Field(default=32.0, ge=MIN_ALPHA, le=MAX_ALPHA)
    """Scale of the change, times the rank."""
    targets: tuple[str, ...] = PROJECTIONS
    """Linear maps that are changed, in every layer: some of q, k, v, out, gate, up, down."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability that an input of A is replaced by 0, in training."""
    start: str | None = None
    """Folder of a LoRA adapter of PEFT to start from, with this rank, alpha and targets; None: B is 0, A random."""

    @model_validator(mode="after")
    def _known_targets(self) -> LoRAConfig:
        unknown = set(self.targets) - set(PROJECTIONS)
        if unknown or not self.targets:
            raise ValueError(
                f"targets must be some of {', '.join(PROJECTIONS)}, found {', '.join(sorted(unknown)) or 'none'}"
            )
        return self

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / self.rank


@dataclass(frozen=True, config=STRICT)
class LossConfig:
    """Cross entropy of every head, summed with these weights."""

    text: float = Field(default=1.0, ge=0)
    """Weight of the text head."""
    audio: tuple[float, ...] = (1.0,) * 7
    """Weights of the audio heads, one per codebook."""
    chunk_size: int = Field(default=2048, gt=0, le=MAX_POSITION)
    """Positions on a device, of all its rows together, whose logits are held at once."""

    @model_validator(mode="after")
    def _seven(self) -> LossConfig:
        if len(self.audio) != 7 or min(self.audio) < 0:
            raise ValueError(f"audio must be 7 weights of 0 or more, found {self.audio}")
        return self


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """AdamW, linear warm-up, cosine decay."""

    steps: int = Field(gt=0, le=MAX_STEPS)
    """Steps of the run."""
    peak_lr: float = Field(gt=0)
    """Learning rate after the warm-up."""
    end_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end."""
    warmup_steps: int = Field(default=0, ge=0, le=MAX_STEPS)
    """Steps of the warm-up, which begins at a learning rate of 0."""
    b1: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of AdamW's first moments."""
    b2: float = Field(default=0.95, ge=0, lt=1)
    """Decay rate of AdamW's second moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moments."""
    weight_decay: float = Field(default=0.1, ge=0)
    """On matrices only, not on norms and biases."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this global norm."""
    gradient_accumulation_steps: int = Field(default=1, gt=0, le=MAX_BATCH_SIZE)
    """Micro-batches a batch is computed in, one after the other, to save memory."""
    gradient_accumulation_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the sum of the gradients of several micro-batches."""


@dataclass(frozen=True, config=STRICT)
class MeshConfig:
    """Devices along each mesh axis."""

    data: int = Field(default=-1, ge=-1, le=MAX_DEVICES)
    """Ways to split the batch; -1: all devices that the other two leave."""
    fsdp: int = Field(default=1, gt=0, le=MAX_DEVICES)
    """Ways to split the batch and the parameters (fully sharded data parallelism)."""
    tensor: int = Field(default=1, gt=0, le=MAX_DEVICES)
    """Ways to split heads, MLPs and vocabularies (tensor parallelism)."""


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """When a run saves checkpoints, and which it keeps."""

    save_interval_steps: int = Field(default=500, gt=0, le=MAX_STEPS)
    """Steps between checkpoints; one more is saved at the end."""
    max_to_keep: int = Field(default=3, gt=0, le=MAX_STEPS)
    """Newest checkpoints to keep."""
    keep_period: int | None = Field(default=None, gt=0)
    """Also keep every checkpoint at a multiple of this many steps."""


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    """What is measured on `data.held_out` during a run."""

    interval_steps: int | None = Field(default=None, gt=0)
    """Steps between evaluations; None: only at the end."""
    max_batches: int | None = Field(default=None, gt=0)
    """Batches of each task that losses are measured on; None: all."""
    num_answers: int = Field(default=0, ge=0)
    """Held-out exchanges of each task that outputs text which are answered, for the accuracy of the answers and the WER
    of the transcripts. Needs the extra `evaluation`, and a run of one process."""
    num_samples: int = Field(default=2, ge=0)
    """Held-out questions that are answered for TensorBoard, in text and speech."""
    keep_best: Literal["loss", "answer_accuracy", "wer"] | None = None
    """Also keep the model of the evaluation that was best by this metric, as a release in `best`; None: only the last
    model is kept."""

    @model_validator(mode="after")
    def _measured(self) -> EvaluationConfig:
        if self.keep_best in ("answer_accuracy", "wer") and not self.num_answers:
            raise ValueError(f"keep_best: {self.keep_best} needs answers: expected num_answers above 0, found 0")
        return self


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """One stage of training: which modules are trained, on what, how, from where to where."""

    out: str
    """Folder of the run: checkpoints, metrics, and at the end `release`."""
    start: str
    """Release folder to start from, `preset:NAME` for random weights, or the run folder of an earlier stage."""
    trainable: tuple[str, ...]
    """Modules that are trained; the others are frozen: no gradient, no optimizer state, no update."""
    data: DataConfig
    optimizer: OptimizerConfig
    lora: LoRAConfig | None = None
    """Train a low-rank change of the trunk; None: the trunk is frozen or trained as a whole."""
    loss: LossConfig = LossConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    remat: Literal["none", "dots", "full"] = "full"
    """What the backward pass recomputes: nothing, all but matrix products, or whole blocks."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; trained parameters are float32. `auto`: bfloat16, on CPU float32."""
    frozen_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """How frozen parameters are held in memory. int8: linear maps of trunk and TTS adapter in eight bits with a scale
    for each output, the rest in bfloat16. The release has the frozen parameters of `start` as they were."""
    log_interval_steps: int = Field(default=10, gt=0, le=MAX_STEPS)
    """Steps between log lines. Only at these steps does the host wait for the device."""
    max_skipped_steps: int = Field(default=10, gt=0)
    """Consecutive steps that may be skipped because their loss is not finite before the run stops."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Of random weights, the order of the records, and augmentation."""
    wandb: str | None = None
    """Weights & Biases project to log to; needs the package wandb."""

    @model_validator(mode="after")
    def _known_modules(self) -> RunConfig:
        unknown = set(self.trainable) - set(MODULES)
        if unknown or not self.trained:
            raise ValueError(
                f"trainable must be some of {', '.join(MODULES)}, found {', '.join(sorted(unknown)) or 'none'}"
            )
        if self.lora and "trunk" in self.trainable:
            raise ValueError("trainable: expected no trunk with lora, which adapts a frozen trunk")
        if self.data.cached_features and "audio_encoder" in self.trainable:
            raise ValueError("trainable: data.cached_features needs a frozen audio_encoder")
        best = self.evaluation.keep_best
        if best and not self.data.held_out:
            raise ValueError(f"evaluation.keep_best: {best} is measured on data.held_out, which has no source")
        if best == "wer" and "A1T1" not in self.data.tasks:
            raise ValueError("evaluation.keep_best: wer is measured on A1T1, which data.tasks does not have")
        if best == "answer_accuracy" and not {"A1A2", "A1T2", "T1A2", "T1T2"} & set(self.data.tasks):
            raise ValueError(
                "evaluation.keep_best: answer_accuracy is measured on A1A2, A1T2, T1A2 and T1T2, "
                f"data.tasks has {', '.join(self.data.tasks)}"
            )
        if self.data.batch_size % self.optimizer.gradient_accumulation_steps:
            raise ValueError(
                "data.batch_size must be a multiple of optimizer.gradient_accumulation_steps, "
                f"found {self.data.batch_size} and {self.optimizer.gradient_accumulation_steps}"
            )
        return self

    @property
    def trained(self) -> tuple[str, ...]:
        """The modules that have gradients: those of `trainable`, and `lora` if there is one."""
        return (*self.trainable, *([LORA] if self.lora else []))
