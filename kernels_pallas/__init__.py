"""Pallas kernels for TPU and GPU."""
