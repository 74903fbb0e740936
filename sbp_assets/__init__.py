"""Synthetic Bootstrapped Pretraining (SBP) as Dagster data assets (Yang et al., arXiv 2509.15248)."""
