"""Self-discovery: latents, nearest patients, anchors, and how good they are."""
