"""What shardwise is compared with: a hand-written loop, the Hugging Face Trainer, TRL."""
