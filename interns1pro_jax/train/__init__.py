"""Training: state, step, loop, metrics and the report at the end."""
