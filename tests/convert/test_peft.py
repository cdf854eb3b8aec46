"""LoRA adapters of every family of language models: PEFT's in, ours out, against what PEFT computes."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx, traverse_util
from typer.testing import CliRunner

from omni_jax.checkpoint.release import Release, open_release
from omni_jax.checkpoint.tensors import is_stacked, tensor_name, tensor_names
from omni_jax.config.model import PRESETS
from omni_jax.config.run import PROJECTIONS, LoRAConfig
from omni_jax.convert import families, peft
from omni_jax.convert.commands import app
from omni_jax.errors import CheckpointError, ConversionError
from omni_jax.model.lora import add_lora
from omni_jax.model.omni import OmniModel
from tests.convert.families import CASES, Case, error, import_case

pytestmark = [
    pytest.mark.usefixtures("quickly_compiled"),
    # Of transformers, about what peft calls.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

IDS = np.random.default_rng(0).integers(0, 300, (2, 40))
TRUNK = PRESETS["tiny"].trunk


def their_targets(fused: bool) -> list[str]:
    return ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"] if fused else [f"{name}_proj" for name in ALL]


ALL = ("q", "k", "v", "o", "gate", "up", "down")


def adapted(model: Any, **changes: Any) -> Any:
    """A model of transformers with a random LoRA of PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **changes))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return wrapped.eval()


def their_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.numpy()


def our_logits(model: OmniModel) -> jax.Array:
    graph, state = nnx.split(model)

    @jax.jit
    def logits(state: Any) -> jax.Array:
        model = nnx.merge(graph, state)
        x = model.embed.text[IDS] * model.config.trunk.embedding_multiplier
        hidden, _ = model.trunk(x, jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape))
        return model.text_logits(model.norm(hidden))[..., : model.config.vocab.text]

    return logits(state)


def with_lora(release: Release, adapter: peft.Adapter, rank: int, *, stacked: bool) -> OmniModel:
    """The model of a release, and an adapter that is not merged."""
    model = release.load_model(stacked=stacked, dtype=jnp.float32)
    targets = tuple(name for name in PROJECTIONS if any(f".{name}.lora" in tensor for tensor in adapter.tensors))
    add_lora(model, LoRAConfig(rank=rank, alpha=adapter.alpha * rank / adapter.rank, targets=targets))
    graph, state = nnx.split(model)
    flat = traverse_util.flatten_dict(nnx.to_pure_dict(state))
    for path, value in flat.items():
        if "lora" in path:
            arrays = [adapter.tensors[name].read() for name in tensor_names(path, value.shape)]
            flat[path] = jnp.asarray(np.stack(arrays) if is_stacked(path) else arrays[0])
            assert flat[path].shape == value.shape
    return nnx.merge(graph, traverse_util.unflatten_dict(flat))


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)), ids=[case.title for case in CASES])
def test_adapter_of_every_family_gives_the_logits_of_peft(number: int, case: Case, tiny_parts: Path, tmp_path: Path):
    """Read, merged, and written again: PEFT loads it, with all its names and no others."""
    from peft import PeftModel, get_peft_model_state_dict

    theirs, release = import_case(case, tiny_parts, tmp_path)
    plain = their_logits(theirs)
    fused = families.FAMILIES[case.family].fused
    theirs = adapted(theirs, r=6, lora_alpha=9, target_modules=their_targets(fused), use_rslora=number % 3 == 0)
    expected = their_logits(theirs)
    assert np.abs(expected - plain).max() > 0.1
    theirs.save_pretrained(tmp_path / "adapter")

    trunk = release.config.trunk
    adapter = peft.read(tmp_path / "adapter", trunk)
    assert {name.split(".")[-3] for name in adapter.tensors} == set(PROJECTIONS)
    unmerged = with_lora(release, adapter, 6, stacked=number % 2 == 0)
    assert error(our_logits(unmerged), expected) <= 1e-4
    merged = peft.merge({**release.model_tensors(), **adapter.tensors}, adapter.alpha / adapter.rank)
    # Our own release of a language model is one of transformers.
    state = {name: tensor.read() for name, tensor in merged.items()}
    assert error(our_logits(load(release, state)), expected) <= 1e-4

    config = LoRAConfig(rank=adapter.rank, alpha=adapter.alpha)
    peft.write(tmp_path / "back", trunk, config, adapter.tensors)
    again = PeftModel.from_pretrained(theirs.unload(), tmp_path / "back")
    assert error(their_logits(again), expected) <= 1e-4
    written = safetensors.numpy.load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert set(get_peft_model_state_dict(again)) == set(written)
    # Reading is the inverse of writing, also of linear maps that are one in theirs.
    back = peft.read(tmp_path / "back", trunk)
    assert (back.rank, back.alpha) == (adapter.rank, adapter.alpha)
    assert {name: tensor.read().tobytes() for name, tensor in back.tensors.items()} == {
        name: tensor.read().tobytes() for name, tensor in adapter.tensors.items()
    }


def load(release: Release, state: dict[str, np.ndarray]) -> OmniModel:
    model = release.load_model(stacked=False, dtype=jnp.float32)
    graph, params = nnx.split(model)
    flat = {path: state[tensor_name(path)] for path, _ in nnx.to_flat_state(params)}
    return nnx.merge(graph, traverse_util.unflatten_dict(flat))


def folder_with(folder: Path, changes: dict[str, Any] | None = None, **tensors: np.ndarray) -> Path:
    """An adapter of the query projection of layer 0 of rank 2, and further tensors."""
    (folder / "lora").mkdir(parents=True, exist_ok=True)
    state = {
        f"{peft.PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight": np.full((2, 48), 0.5, np.float32),
        f"{peft.PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight": np.full((64, 2), 2.0, np.float32),
    }
    safetensors.numpy.save_file(state | tensors, folder / "lora" / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", **(changes or {})}
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(values))
    return folder / "lora"


def test_read_folds_another_alpha_into_b(tmp_path: Path):
    folder = folder_with(tmp_path, {"alpha_pattern": {"layers.0.self_attn.q_proj": 1}})
    adapter = peft.read(folder, TRUNK)
    assert (adapter.rank, adapter.alpha) == (2, 4.0)
    assert set(adapter.tensors) == {"trunk.layers.0.attention.q.lora.a", "trunk.layers.0.attention.q.lora.b"}
    assert adapter.tensors["trunk.layers.0.attention.q.lora.b"].shape == (4, 16, 2)
    assert (adapter.tensors["trunk.layers.0.attention.q.lora.b"].read() == 0.5).all()


def test_read_takes_names_of_a_model_that_sees(tmp_path: Path):
    folder = folder_with(tmp_path)
    state = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    renamed = {
        name.replace(f"{peft.PREFIX}model.", f"{peft.PREFIX}model.language_model."): array
        for name, array in state.items()
    }
    safetensors.numpy.save_file(renamed, folder / "adapter_model.safetensors")
    assert len(peft.read(folder, TRUNK).tensors) == 2


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"peft_type": "IA3"}, {}, "peft_type: expected LORA, found IA3"),
        ({"use_dora": True}, {}, "use_dora: expected None or False, found True"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights: expected .*, found pissa"),
        ({"bias": "all"}, {}, "bias: expected None or none, found all"),
        ({"r": 0}, {}, "r: expected 1 to 1048576, found 0"),
        ({"lora_alpha": 0}, {}, "lora_alpha: expected an alpha of 1e-06 to 1000000.0, found 0.0"),
        ({"r": "many"}, {}, "expected values of the types of the format"),
        ({"alpha_pattern": {"(a+)+": 1}}, {}, "alpha_pattern: expected names, found"),
        (
            {},
            {f"{peft.PREFIX}model.embed_tokens.lora_embedding_A": np.ones((2, 300), np.float32)},
            r"model.embed_tokens.lora_embedding_A: unknown, found \(2, 300\)",
        ),
        (
            {},
            {f"{peft.PREFIX}model.layers.0.mlp.up_proj.lora_A.weight": np.ones((2, 48), np.float32)},
            r"up_proj: expected A \(r, 48\) and B \(96, r\), found \(2, 48\) and none",
        ),
        (
            {},
            {f"{peft.PREFIX}model.layers.2.self_attn.k_proj.lora_A.weight": np.ones((2, 48), np.float32)},
            r"model.layers.2.self_attn.k_proj.lora_A.weight: unknown",
        ),
    ],
)
def test_read_refuses_what_is_no_plain_lora_of_the_trunk(tmp_path: Path, changes: dict, tensors: dict, message: str):
    with pytest.raises(ConversionError, match=message):
        peft.read(folder_with(tmp_path, changes, **tensors), TRUNK)


def test_read_refuses_another_trunk_and_no_adapter(tmp_path: Path):
    with pytest.raises(ConversionError, match=r"q_proj: expected A \(r, 896\) and B \(896, r\), found"):
        peft.read(folder_with(tmp_path), PRESETS["mini_omni"].trunk)
    with pytest.raises(ConversionError, match=r"adapter_config\.json: "):
        peft.read(tmp_path, TRUNK)
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: "):
        peft.read(tmp_path / "lora", TRUNK)


def test_convert_merge_makes_a_release(tiny_release: Path, tmp_path: Path):
    imported = shutil.copytree(tiny_release, tmp_path / "imported")
    (imported / "model_config.yaml").write_text("# as it came\n")
    done = CliRunner().invoke(
        app, ["merge", str(imported), str(folder_with(tmp_path)), str(tmp_path / "merged")], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert (tmp_path / "merged" / "model_config.yaml").read_text() == "# as it came\n"
    before, after = (
        {name: tensor.read() for name, tensor in open_release(folder).model_tensors().items()}
        for folder in (tiny_release, tmp_path / "merged")
    )
    # 4 / 2 * (2 * 0.5 + 2 * 0.5).
    name = "trunk.layers.0.attention.q.weight"
    np.testing.assert_allclose(after.pop(name), before.pop(name) + 4, atol=1e-5)
    assert {name: array.tobytes() for name, array in before.items()} == {n: x.tobytes() for n, x in after.items()}
