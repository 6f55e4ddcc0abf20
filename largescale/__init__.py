"""Self-supervised pretraining at scale: shards in, measured representations out."""
