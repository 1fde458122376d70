"""The model: a timm backbone, a light decoder, one head per task."""
