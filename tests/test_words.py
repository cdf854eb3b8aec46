"""Words of the field: names and phrases that this project has replaced must not come back."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

REPLACED = {
    # names
    r"\bears?\b": "audio encoder",
    r"EarConfig": "AudioEncoderConfig",
    r"\bhears?\b|\bheard\b|\bhearing\b": "encode_audio, takes_audio, process",
    r"\blay_on\b|\btraced_for\b": "jax.set_mesh",
    r"\b_?Seat\b|\bseats?\b|\bseated\b": "ActiveRequest, admit",
    r"\bshadows?\b": "companion row",
    r"\bbegin_anew\b|\banew\b": "reset, again",
    r"\bTalk\(|\bAsk\(|\bLive\(": "RequestHandle, Request, AsyncEngine",
    r"\bplayable\b|\brepaired_codes\b": "fill_invalid_codes, num_invalid_codes",
    r"cut=True|--cut\b": "truncate",
    r"\bkeep_every\b|\bmost_corrupt\b|\bmost_skipped\b": "keep_period, max_corrupt, max_skipped_steps",
    r"\bkv_heads=|\bhead_size\b|\bffn\b": "num_kv_heads, head_dim, intermediate_size",
    r"\btensorfile\b|\bvoicing\b|\bVoiced\b|\bbetween_silences\b|\bdirectness\b": "safetensors_io, SpokenCorpus, ...",
    r"\bletter_errors\b|\blistener\b|as heard\b": "char_errors, ASR judge, ASR-WER",
    r"\bbeside\b": "overlapped, next to",
    r"\bmisread\b|\bcode_noise\b": "corrupt_codes, audio_token_noise",
    r"\buntaught\b|\btaught\b": "untrained, trained",
    r"\bstir\(|SlowDecoder|slow decoder": "perturb, ReferenceDecoder",
    # prose
    r"\bwhoever\b|\bnobody\b|in vain\b|\bfor ever\b": "a subject that does something",
    # spelling
    r"\blicen[c]e|\bnormalis|\bcolour|\boptimis|\bquantis|\brecognis|\bsynthesis[ei]|\bneighbour|\bbehaviour|\bcentre\b"
    r"|\butilis|\brandomis|\binitialis|\btokenis|\bserialis": "American spelling",
}
"""Patterns, and what to write instead."""

# The last two are a part of CTranslate2's names and a field of LitGPT's config.
QUOTED = (
    "Models Can Hear",
    "models can hear",
    "EventListener",
    "Do you hear",
    "do you hear",
    "I can hear and talk",
    "I did not hear that",
    "ffn/",
    '"head_size"',
)
"""Phrases and names of others."""

EXCLUDED = ("tests/test_words.py", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "constraints.txt")


def files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    kinds = (".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".js", ".html", ".css", "Makefile")
    found = [ROOT / name for name in listed.stdout.split("\n") if name.endswith(kinds) and name not in EXCLUDED]
    # The texts of the recipe are data: sentences that the model is trained on.
    return [path for path in found if path.is_file() and "recipes/nano/facts" not in str(path)]


@pytest.mark.parametrize("pattern", REPLACED)
def test_replaced_words_are_gone(pattern: str) -> None:
    hits = []
    for path in files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(pattern, line) and not any(phrase in line for phrase in QUOTED):
                hits.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not hits, f"write {REPLACED[pattern]}:\n" + "\n".join(hits)
