"""docs/run_config.md is what docs/generate_config_reference.py writes."""

import runpy
from pathlib import Path

from omni_jax.config.run import RunConfig

DOCS = Path(__file__).parents[2] / "docs"


def test_run_config_reference_is_up_to_date():
    reference = runpy.run_path(str(DOCS / "generate_config_reference.py"))["reference"]()
    assert (DOCS / "run_config.md").read_text(encoding="utf-8") == reference, (
        "run python docs/generate_config_reference.py"
    )


def test_run_config_reference_explains_every_field():
    page = (DOCS / "run_config.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > len(RunConfig.__dataclass_fields__)
    assert not [row for row in rows if row.endswith("|  |")]
