"""Variance propagation in Pre-LN transformers: theory, simulation, training, comparison."""
