"""What runs on the host: analyse, plan, prune, fine-tune, export, verify, report."""
