"""`python -m qwen_rerank`: the command line where its script is not on the path."""

from qwen_rerank.cli import main

if __name__ == "__main__":
    main()
