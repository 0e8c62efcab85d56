"""What the TPU kernel of ops/pallas_tpu.py reads: tiles, codes as words, tables as bytes."""
