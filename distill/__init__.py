"""The lesson: data, losses, training, instruction tuning, and the `distill` command."""
