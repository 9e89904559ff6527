"""The HTTP server: a `Scorer` behind the rerank routes that other software already speaks, with a playground page."""
