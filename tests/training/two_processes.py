"""What tests/training/test_step.py starts twice: steps of a global batch with two processes of four devices each.

Arguments: coordinator, number of this process, file for what process 0 has found.
"""

import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

if __name__ == "__main__":
    coordinator, process, file = sys.argv[1:]
    jax.distributed.initialize(coordinator, 2, int(process))
    assert (jax.device_count(), jax.local_device_count()) == (8, 4)

    from jax.sharding import Mesh

    from omni_jax import sharding
    from omni_jax.training import loop
    from tests.training import test_step

    found = {}
    for sizes in test_step.TWO_PROCESS_MESHES:
        mesh = sharding.make_mesh(*sizes)
        trainer = test_step.Trainer(test_step.run_config(), mesh)
        state, metrics = trainer.go(test_step.STEPS)
        whole = multihost_utils.process_allgather(state.learning, tiled=True)
        name = "x".join(map(str, sizes))
        found |= {f"{name}/{key}": value for key, value in test_step.flat(whole).items()}
        found[f"{name}/loss"] = np.array([step["loss"] for step in metrics])
    # A process's rows need not be neighbors.
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4).T.reshape(8, 1, 1), sharding.AXES)
    share, shares = loop.row_share(mesh, jax.process_index())
    mine = {name: np.split(rows, shares)[share] for name, rows in test_step.batch().items()}
    placed = loop.place(mine, mesh)
    found["targets"] = multihost_utils.process_allgather(placed.arrays["targets"], tiled=True)
    if jax.process_index() == 0:
        np.savez(file, **found)
    multihost_utils.sync_global_devices("done")
