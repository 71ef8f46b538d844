"""Plain models in and out: timm, transformers and safetensors."""
