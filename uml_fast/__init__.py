"""uml_fast: a fast trainer for unpaired multimodal models (UML, arXiv 2510.08492)."""

__version__ = "0.1.0"
