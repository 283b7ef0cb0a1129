"""Faults injected into a fleet, and what became of its promises: see `__main__`."""
