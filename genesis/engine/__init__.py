"""The training loop, its checkpoints and its monitor; it knows no method."""
