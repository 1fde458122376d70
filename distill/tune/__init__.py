"""Instruction tuning of generators on (image, instruction, RGB answer) pairs."""
