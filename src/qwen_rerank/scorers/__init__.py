"""Scorers: the local Qwen3-Reranker engine, other cross-encoders, rerank servers, and several of them as one."""
