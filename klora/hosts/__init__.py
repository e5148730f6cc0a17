"""Where K-LoRA runs: one module per host behind the protocol in `base`."""
