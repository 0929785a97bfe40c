"""The commonest mistakes, found before libraries are imported that take seconds.

Whatever is checked here, a run checks again; so it may be left out, and it may change nothing.
"""

from typing import Any

from model.config import check_tokenizer_files, load_config
from model.files import Folder, lacks_credentials, storage_error
from model.weights.index import check_shards
from pipeline.ledger import Ledger
from pipeline.sources import open_source
from schemas.errors import ConfigError, EngineError
from schemas.job import Job


def check(job: Job) -> None:
    """SOURCE is there, OUT can be written, --model looks like one and lacks no file. Raises
    ConfigError."""
    open_source(job.source, job.endpoint_url)
    Ledger(job.output, job.endpoint_url).check()
    folder = Folder(job.model, job.endpoint_url)
    _refuse_without_credentials(folder)
    try:
        config = load_config(folder)
        if not job.random_weights:
            check_shards(folder)
        check_tokenizer_files(folder)
    except EngineError as error:  # the storage is out of reach
        raise ConfigError(str(error)) from error
    if job.pp > config.text.num_layers:
        raise ConfigError(
            f"--pp is {job.pp}, and {job.model} has {config.text.num_layers} layers; each rank"
            f" holds at least one: expected 1 to {config.text.num_layers}"
        )


def stored_job(output: str, endpoint_url: str | None = None) -> dict[str, Any]:
    """The keys of the job that wrote OUT. Raises ConfigError if none did."""
    return Ledger.of_dataset(output, endpoint_url).job["job"]


def _refuse_without_credentials(folder: Folder) -> None:
    """Reads of a checkpoint are patient, which is of no use where there are none."""
    try:
        folder.fs.exists(folder.path("config.json"))
    except Exception as error:  # storage clients raise far more than OSError
        if lacks_credentials(error):
            raise ConfigError(f"cannot read {folder} (--model): {storage_error(error)}") from error
