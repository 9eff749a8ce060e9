"""Model type `example_llama`: the host's llama, with logits multiplied by `logit_scale` of the config."""

from dataclasses import dataclass

from mlx_lm.models import llama


@dataclass
class ModelArgs(llama.ModelArgs):
    logit_scale: float = 1.0


class Model(llama.Model):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * self.args.logit_scale
