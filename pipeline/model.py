"""What the flow knows of the checkpoint before anything of it is loaded. Neither Ray nor GPU."""

from dataclasses import dataclass

from model.config import VL01Config
from model.engine.constraint import check_schema
from model.engine.ranks import layer_spans
from model.inputs.prompt import PromptTemplate
from model.tokenizer import Tokenizer
from model.weights.checkpoint import check_checkpoint
from pipeline.render.settings import PageSettings
from schemas.job import Job

# Address space of the process that renders pages: libraries and a document's own structures, and
# at the peak a page in PDFium's bitmap, in Pillow's image and in its three channels.
_RENDERER_BYTES = 1024**3
_PIXEL_BYTES = 16


@dataclass(frozen=True)
class Model:
    """What the checkpoint says of itself, and the job's prompt as its tokens."""

    config: VL01Config
    template: PromptTemplate

    def page_settings(self, job: Job) -> PageSettings:
        """How the pages of documents are rendered for this checkpoint."""
        return PageSettings(
            pinpoints=tuple(self.config.pinpoints),
            dpi=job.dpi,
            max_pages=job.max_pages,
            max_pixels=job.max_pixels,
            page_seconds=job.page_seconds,
            document_seconds=job.document_seconds,
            memory_bytes=_RENDERER_BYTES + _PIXEL_BYTES * job.max_pixels,
        )


def open_model(job: Job) -> Model:
    """Raises ConfigError: no VL-01 there, more ranks than layers, special tokens in the prompt, a
    schema that answers cannot be held to."""
    config = check_checkpoint(job.model, quantization=job.quantization)
    layer_spans(config.text.num_layers, job.pp)
    if json_schema := job.sampling().json_schema:
        check_schema(json_schema)
    template = Tokenizer.from_checkpoint(job.model).prompt_template(job.prompt, job.system)
    return Model(config, template)
