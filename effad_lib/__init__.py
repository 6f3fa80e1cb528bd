"""EfficientAD (arXiv 2303.14535): visual anomaly detection trained on good images only."""

__version__ = "0.1.0"
