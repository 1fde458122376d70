"""Picture <-> quantity: pure functions, no model, no input or output."""
