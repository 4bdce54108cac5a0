"""Reports and text encoders: what of a report is shown, and how it becomes numbers."""
