from __future__ import annotations

import pytest

from omni_jax.cli.records import beam_options
from omni_jax.errors import ConfigError


def test_beam_options() -> None:
    assert beam_options(None, 2, None) is None
    assert beam_options("DataflowRunner", 2, ["--project=p"]) == ["--runner=DataflowRunner", "--project=p"]
    assert beam_options("DirectRunner", 1, None) == ["--runner=DirectRunner", "--direct_num_workers=1"]
    assert "--direct_running_mode=multi_processing" in (beam_options("DirectRunner", 2, None) or ())
    with pytest.raises(ConfigError, match="expected --runner before options for it, found --project=p"):
        beam_options(None, 2, ["--project=p"])
