"""Faults that a long run meets, in miniature."""
