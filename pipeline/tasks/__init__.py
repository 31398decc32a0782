"""What a network is for: its images, their augmentation, its loss and its accuracy."""
