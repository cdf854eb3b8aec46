"""Loading the real shape from a release folder: seconds and peak memory, against reading the file and no more.

Each way runs in a process of its own, three times in turns, so that its peak memory is its own. The first round, which
brings the file into the system's cache, is not counted.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from flax import nnx

from omni_jax.checkpoint import release as checkpoint
from omni_jax.checkpoint.safetensors_io import LazyTensor
from omni_jax.checkpoint.tensors import parameter_shapes
from omni_jax.codec.snac import Snac
from omni_jax.config.model import PRESETS
from omni_jax.tokenizer import byte_tokenizer

WAYS = {
    # What cannot be undercut: the bytes, into memory, once.
    "read the file": "x = [np.fromfile(f, np.uint8) for f in Path(sys.argv[1]).glob('*.safetensors')]",
    "Omni.load": "from omni_jax import Omni; x = Omni.load(sys.argv[1])",
    # The straightforward way: all tensors, then all arrays.
    "load_file, then jax": (
        "import jax, jax.numpy as jnp, safetensors.numpy\n"
        "x = [safetensors.numpy.load_file(f) for f in Path(sys.argv[1]).glob('*.safetensors')]\n"
        "y = jax.block_until_ready(jax.tree.map(jnp.array, x))"
    ),
}
PROGRAM = """
import sys, time
from pathlib import Path
import jax, numpy as np, omni_jax.api, omni_jax.checkpoint
jax.devices()
def memory(line):  # kB of this program alone: getrusage would count what its parent had
    return int(Path("/proc/self/status").read_text().split(line)[1].split()[0])
before, start = memory("VmRSS:"), time.perf_counter()
{way}
print(time.perf_counter() - start, (memory("VmHWM:") - before) * 1024)
"""
ROUNDS = 3


def write_release(folder: Path) -> int:
    """A release of the published shape with random weights, tensor by tensor; its size in bytes."""
    config = PRESETS["mini_omni"]
    rng = np.random.default_rng(0)

    def tensor(shape: tuple[int, ...]) -> LazyTensor:
        return LazyTensor(shape, np.dtype(np.float32), lambda: rng.standard_normal(shape, np.float32))

    tensors = {name: tensor(shape) for name, shape in parameter_shapes(config).items()}
    codec = {
        name: LazyTensor.of(np.asarray(value)) for name, value in Snac(config.codec, rngs=nnx.Rngs(0)).params().items()
    }
    files = [folder.parent / name for name in checkpoint.TOKENIZER_FILES]
    byte_tokenizer().save(str(files[0]))
    files[1].write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")
    checkpoint.save_release(folder, config, tensors, codec, files)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "release"
        size = write_release(folder)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
        for turn in range(ROUNDS + 1):
            for name, way in WAYS.items():
                command = [sys.executable, "-c", PROGRAM.format(way=way), str(folder)]
                seconds, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
                if turn:
                    found[name].append((float(seconds), float(peak)))
    print(f"{size / 1e9:.2f} GB of float32; medians of {ROUNDS} processes each")
    print(f"{'':>20} {'seconds':>8} {'peak GB':>8} {'of the weights':>15}")
    for name, runs in found.items():
        seconds, peak = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"{name:>20} {seconds:>8.2f} {peak / 1e9:>8.2f} {peak / size:>14.2f}x")


if __name__ == "__main__":
    main()
