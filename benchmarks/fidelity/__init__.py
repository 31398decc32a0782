"""How well latency tables predict, beside sums of isolated layers and multiply-adds."""
