"""Scorers: the local Qwen3-Reranker engine, sentence-transformers cross-encoders, and rerank servers."""
