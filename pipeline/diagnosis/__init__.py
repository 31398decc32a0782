"""What criteria mean on one network."""
