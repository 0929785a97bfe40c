"""A job: the named, complete configuration of a run, as a user writes it in flags or in YAML.

Knows what is allowed; whether paths, checkpoint and hardware are really there is for `jobs/`.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from schemas.ladder import Step
from schemas.requests import Sampling

if TYPE_CHECKING:
    from schemas.extraction import Extraction

Positive = Annotated[int, Field(ge=1)]


class Job(BaseModel):
    """Every key of a job file; each but `task` and `ladder` is a flag of the command too
    (max_pixels: `--max-pixels`)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True
    )

    task: Literal["caption", "ocr", "extract"] = "caption"
    source: str = Field(
        min_length=1,
        description="a folder, a glob, or a file: an image, .pdf, .tif, .tar, .parquet, or a list"
        " of addresses in a .txt, .csv or .jsonl",
    )
    output: str = Field(min_length=1, description="the folder of the dataset that is written")
    model: str = Field(
        min_length=1, description="a checkpoint folder in VL-01's released layout, or its address"
    )

    prompt: str = Field(min_length=1, description="what is asked of every image")
    system: str | None = Field(None, description="the system message, if any")
    json_schema: str | None = Field(  # BaseModel.schema is taken; as text: its order is a meaning
        None,
        alias="schema",
        description="the fields: a JSON Schema file, or invoice, receipt, form or table",
    )

    max_new_tokens: Positive = Field(256, description="longest answer, in tokens")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling; 1 keeps every token")
    seed: int = Field(0, ge=0, description="the same seed gives the same text")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="strings that end an answer"
    )
    stop_repetition: bool = Field(False, description="end an answer that goes round in circles")
    retries: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="most times a poor answer is tried again; default: each step of the ladder",
    )
    ladder: tuple[Step, ...] = Field((), description="what is tried again when an answer is poor")
    skip_blank: bool = Field(False, description="answer blank pages without asking the model")
    dedupe: Literal["exact", "none"] = Field(
        "exact", description="exact: compute identical images once, and copy the answer"
    )

    image_column: str | None = Field(None, description="the image column of Parquet sources")
    uri_column: str | None = Field(
        None, description="the column of addresses, in a .csv, .jsonl or .parquet"
    )
    keep: tuple[str, ...] = Field(
        (), description="other columns of Parquet files and lists to carry to the output"
    )
    unit_rows: Positive = Field(
        256, description="rows committed together, where a source can be cut"
    )
    grow: bool = Field(
        False, description="list the source again, and do what is new or changed in it"
    )
    settle_seconds: float = Field(
        30.0, ge=0, description="with --grow: files written more recently wait for the next run"
    )
    max_pixels: Positive = Field(100_000_000, description="larger images become failed rows")
    max_bytes: Positive = Field(256 * 1024**2, description="larger files become failed rows")
    decode_seconds: float = Field(30.0, gt=0, description="longest time to decode one image")
    dpi: float | None = Field(
        None, gt=0, description="pixels an inch of PDF pages; default: what suits the model's grid"
    )
    max_pages: Positive = Field(10_000, description="documents of more pages become a failed row")
    page_seconds: float = Field(30.0, gt=0, description="longest time to render one page")
    document_seconds: float = Field(
        3600.0, gt=0, description="longest time to render one document; pages left then fail"
    )
    documents: bool = Field(
        False, description="also join the pages of each document, in _vl01/documents of the output"
    )
    markdown: bool = Field(
        False, description="the same, and a .md file for each document, in _vl01/markdown"
    )
    allow_host: tuple[str, ...] = Field(
        (), description="host[:port] or network that lists may lead to though it is not public"
    )
    fetch_seconds: float = Field(
        60.0, gt=0, description="longest time to fetch one address, all tries together"
    )
    host_requests: Positive = Field(
        4, description="requests that one machine makes to one host at a time"
    )
    host_rate: float = Field(
        20.0, gt=0, description="requests that one machine makes to one host in a second"
    )
    exif_rotate: bool = Field(False, description="turn photographs upright by their EXIF tag")

    quantization: Literal["int8", "int8-dynamic", "none"] = Field(
        "int8",
        description="weights of the text model; int8-dynamic: their inputs in int8 too, which is "
        "faster on a Hopper GPU and a little less exact",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="activations; auto is float32 on CPU and bfloat16 on GPU"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    random_weights: bool = Field(
        False,
        description="for measuring only: the texts mean nothing; of the checkpoint only what "
        "python -m model.nano.random_checkpoint DIR --released --no-tensors writes is read",
    )
    pp: Positive = Field(1, description="ranks (GPUs) that share the layers of one replica")
    replicas: Positive | Literal["auto"] = Field(
        1,
        description="copies of the model that run side by side; auto: as many as the cluster has "
        "GPUs for, on CPU one on each node",
    )
    max_sequences: Positive | None = Field(
        None, description="sequences in flight; default: as many as fit on a GPU, 16 on CPU"
    )
    chunk_tokens: Positive | None = Field(
        None,
        description="tokens computed together; default: 16384 on a GPU, 8192 on each of several, "
        "2048 on CPU",
    )
    cache_gib: float | None = Field(
        None, gt=0, description="memory for states and K/V per rank; default: what is free on a GPU"
    )

    prepare_workers: Positive | None = Field(None, description="default: from the cores there are")
    address: str = Field("local", description="the Ray cluster: local, auto, or its address")
    endpoint_url: str | None = Field(None, description="an S3 server other than AWS's own")
    strict: bool = Field(False, description="exit 3 if any row failed")
    max_failure_rate: float = Field(
        0.2, ge=0, le=1, description="stop, after 200 rows, when more of them than this failed"
    )
    grace_seconds: float = Field(
        25.0, ge=0, description="time to finish what is nearly done when asked to stop"
    )

    @field_validator("replicas", mode="wrap")
    @classmethod
    def _number_or_auto(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError:  # a complaint for each of the two
            wanted = "Input should be a whole number from 1 on, or auto"
            raise PydanticCustomError("number_or_auto", wanted) from None  # type: ignore[arg-type]

    def extraction(self) -> "Extraction | None":
        """What `schema` asks for. Raises ConfigError."""
        from schemas.extraction import load_schema  # only now: help and usage errors come at once

        return None if self.json_schema is None else load_schema(self.json_schema)

    def sampling(self) -> Sampling:
        asked = self.extraction()
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=tuple(self.stop),
            stop_repetition=self.stop_repetition,
            json_schema=asked and asked.json_schema,
        )

    def fingerprint(self, model_revision: str) -> dict[str, Any]:
        """All that decides which rows are written and what they say: every key but the few that
        only decide where and how fast the run goes. Those may change between two runs on one
        output; the rest may not.
        """
        return self.model_dump(mode="json", exclude=WHERE_AND_HOW_FAST) | {
            "model_revision": model_revision
        }


KEYS: dict[str, FieldInfo] = {
    field.alias or name: field for name, field in Job.model_fields.items()
}  # as a user writes them

# What a retry may change for its rows, which then say so: how an answer is drawn, how long it is.
RETRY_MAY_CHANGE = ("max_new_tokens", "temperature", "top_p", "seed")

WHERE_AND_HOW_FAST = {
    "output",
    "model",  # its path; the fingerprint holds its revision
    "device",
    "pp",
    "replicas",
    "max_sequences",
    "chunk_tokens",
    "cache_gib",
    "decode_seconds",
    "page_seconds",
    "document_seconds",
    "documents",
    "markdown",
    "allow_host",
    "fetch_seconds",
    "host_requests",
    "host_rate",
    "prepare_workers",
    "grow",
    "settle_seconds",
    "address",
    "endpoint_url",
    "strict",
    "max_failure_rate",
    "grace_seconds",
}
