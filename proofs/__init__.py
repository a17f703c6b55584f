"""Proofs of the very functions that users call: `python -m proofs`."""
