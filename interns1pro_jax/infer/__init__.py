"""Generation with the model in process."""
