"""Unlearning methods side by side, on the same models and rows, by the same code."""
