"""The plugin's hold on DeepSpeed: the only place that knows the pipeline engine's internals (``internals``)."""

from deepspeed_sentinel.engine.internals import check_modules

check_modules()
