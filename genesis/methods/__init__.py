"""One pretraining method per file."""
