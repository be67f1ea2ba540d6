"""CUDA C++ sources and how they become kernels. Knows no tensors and nothing of the package but its errors and version."""
