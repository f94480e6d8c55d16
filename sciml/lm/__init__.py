"""Language models: objectives, distillation and scaling laws on Hugging Face models."""

__all__: list[str] = []
