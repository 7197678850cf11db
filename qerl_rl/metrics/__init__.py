"""What a run measures, and where it shows: files, TensorBoard, a picture, the console."""
