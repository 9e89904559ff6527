"""The documentation: pages in English and Chinese, and what draws the rest of them from the code and the results."""
