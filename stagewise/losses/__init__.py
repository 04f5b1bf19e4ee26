"""Losses as pure functions of tensors: no model, no tokenizer, no file."""
