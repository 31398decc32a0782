"""Training: fine-tuning, sparsifying, resumable after every epoch."""
