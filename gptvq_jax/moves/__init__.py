"""The moves that quantization methods are made of: pure array code, no Flax, files or configs."""
