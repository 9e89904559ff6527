"""Fine-tuning of rerankers and embedders."""
