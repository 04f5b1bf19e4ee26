"""Subclasses of transformers.Trainer, one level deep; each overrides only what its loss needs."""
