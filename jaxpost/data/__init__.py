"""Records on disk to packed batches: sources, text, tasks, packing, pipeline."""
