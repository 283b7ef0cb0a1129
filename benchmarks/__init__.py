"""Measurements whose results stand in `docs/results`. Ratios are taken side by side in one run."""
