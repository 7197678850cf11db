"""Weight formats, quantized checkpoints, and the noise that QeRL adds to them."""
