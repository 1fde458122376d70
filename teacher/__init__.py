"""The label: asked for, decoded, made metric, stored, measured."""
