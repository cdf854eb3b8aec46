"""Moving weights between layouts: what all converters share."""

from __future__ import annotations


class ConversionError(ValueError):
    """Weights that cannot be converted: one line per tensor that is missing, unknown or misshapen."""
