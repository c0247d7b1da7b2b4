"""The parts of `compute/` that differ on a CUDA device.

Each part is tested on a CPU, or on the device before it is used.
"""
