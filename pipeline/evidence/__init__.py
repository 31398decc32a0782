"""What is known of a network's channels: responses, gradients, measured damage."""
