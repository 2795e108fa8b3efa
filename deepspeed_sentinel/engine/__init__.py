"""The plugin's hold on DeepSpeed: the only place that knows the pipeline engine's internals (0.19.8)."""
