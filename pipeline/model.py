"""What the flow knows of the checkpoint before anything of it is loaded. Neither Ray nor GPU."""

from dataclasses import dataclass

from model.config import VL01Config
from model.engine.ranks import layer_spans
from model.inputs.prompt import PromptTemplate
from model.tokenizer import Tokenizer
from model.weights.checkpoint import check_checkpoint
from schemas.job import Job


@dataclass(frozen=True)
class Model:
    """What the checkpoint says of itself, and the job's prompt as its tokens."""

    config: VL01Config
    template: PromptTemplate


def open_model(job: Job) -> Model:
    """Raises ConfigError: no VL-01 there, more ranks than layers, special tokens in the prompt."""
    config = check_checkpoint(job.model, quantization=job.quantization)
    layer_spans(config.text.num_layers, job.pp)
    template = Tokenizer.from_checkpoint(job.model).prompt_template(job.prompt, job.system)
    return Model(config, template)
