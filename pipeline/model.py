"""What the flow knows of the checkpoint before anything of it is loaded. Neither Ray nor GPU."""

from dataclasses import dataclass

from model.config import VL01Config, load_config
from model.engine.constraint import check_schema
from model.engine.ranks import layer_spans
from model.files import Folder
from model.inputs.prompt import PromptTemplate
from model.tokenizer import Tokenizer
from model.weights.checkpoint import check_checkpoint
from model.weights.revision import checkpoint_revision
from pipeline.render.settings import PageSettings
from schemas.errors import ConfigError, EngineError
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
    folder = model_folder(job)
    try:
        if job.random_weights:
            config = load_config(folder)
        else:
            config = check_checkpoint(folder, quantization=job.quantization)
        tokenizer = Tokenizer.from_checkpoint(folder)
    except EngineError as error:  # the storage is out of reach
        raise ConfigError(str(error)) from error
    layer_spans(config, job.pp)
    if json_schema := job.sampling().json_schema:
        check_schema(json_schema)
    return Model(config, tokenizer.prompt_template(job.prompt, job.system))


def model_folder(job: Job) -> Folder:
    return Folder(job.model, job.endpoint_url)


def model_revision(job: Job) -> str:
    """For the job's fingerprint. Raises ConfigError."""
    try:
        return checkpoint_revision(model_folder(job), tensors=not job.random_weights)
    except EngineError as error:
        raise ConfigError(str(error)) from error
