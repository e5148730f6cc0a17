"""The method itself: LoRA files, scores, schedule, selectors, plan. Needs torch, numpy and safetensors only."""
