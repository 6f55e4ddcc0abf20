"""Makes and inspects WebDataset shards; needs no torch."""
