"""Families of models, and parts of each."""
