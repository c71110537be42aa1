"""Compiles TPU kernels without a TPU, reads their static schedules, and models their time."""
