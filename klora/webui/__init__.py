"""K-LoRA inside a WebUI. Only this package, klora.hosts and scripts/ know gradio and the host's modules."""
