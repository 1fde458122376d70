"""Hydra configuration: one YAML per verb, plus groups."""
