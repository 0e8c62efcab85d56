"""Products with quantized weights, one file per implementation; the entry is vq_matmul.py."""
