"""The fast path: the common decoder on an NVIDIA GPU, with fused weights, kernels of its own and CUDA graphs."""
