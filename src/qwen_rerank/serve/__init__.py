"""The rerank server."""
