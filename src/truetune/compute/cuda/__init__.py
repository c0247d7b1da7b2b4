"""What the compute room does otherwise on a CUDA device; each part proved on a CPU or on the device
before it is used."""
