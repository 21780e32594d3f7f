"""Quantization and sparsity through ModelOpt, calibration data and the export of a unified checkpoint."""
