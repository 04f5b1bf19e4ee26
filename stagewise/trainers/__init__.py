"""Subclasses of transformers.Trainer, one level deep, with one mixin; each overrides only what its loss needs."""
