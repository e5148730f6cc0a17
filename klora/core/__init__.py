"""The method itself: LoRA files, scores, schedule, methods, plan. Needs torch, numpy and safetensors only."""
