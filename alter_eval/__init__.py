"""Evaluation: benchmarks of unlearning, on the reference path and through a running server."""
