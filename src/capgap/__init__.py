"""capgap: the working system of the law of capacity gap in distilling language models."""

__version__ = "0.1.0"
