"""Every way this project says no: the exceptions it raises, the reason codes it writes in rows."""

from enum import StrEnum


class ExitCode:
    """Exit codes of the `vl01` command."""

    OK = 0  # every row accounted for; failed rows are rows
    STOPPED = 1  # the run stopped before its end and can be resumed
    USAGE = 2  # wrong usage or configuration, found before any model was loaded
    STRICT = 3  # `--strict` and some rows failed
    UNACCOUNTED = 4  # rows missing or twice


class Reason(StrEnum):
    """Why a row has no answer, or no good one; the `reason` column of a row that is not ok."""

    # read: the bytes could not be had
    NOT_FOUND = "not_found"  # planned, but gone when it was read; HTTP 404 and 410
    READ_ERROR = "read_error"  # the storage answered with an error
    SOURCE_DAMAGED = "source_damaged"  # a tar cut in the middle, a PDF that does not open
    MISSING_COLUMN = "missing_column"  # a Parquet file without the image column
    EMPTY_SOURCE = "empty_source"  # a tar without a single image, a PDF without pages
    MISSING_IMAGE = "missing_image"  # a null for an image or an address, a link in a tar
    BAD_ADDRESS = "bad_address"  # in a list: no address, or of a kind that is not read
    HOST_REFUSED = "host_refused"  # not on the public internet, and not allowed by --allow-host
    HTTP_ERROR = "http_error"  # the server answered with another status than 200, 404 or 410
    TOO_MANY_BYTES = "too_many_bytes"

    # read: a document, or a page of it, could not be rendered (nor, for crash, an image decoded)
    ENCRYPTED = "encrypted"  # a PDF that asks for a password
    TOO_MANY_PAGES = "too_many_pages"
    PAGE_DAMAGED = "page_damaged"
    CRASH = "crash"  # the process that decodes it died of it, or ran out of its memory

    # prepare: the bytes are not a usable image
    EMPTY_FILE = "empty_file"
    NOT_AN_IMAGE = "not_an_image"
    DECODE_ERROR = "decode_error"  # an image format was recognised, its content is damaged
    TOO_MANY_PIXELS = "too_many_pixels"
    TIMEOUT = "timeout"  # took too long to fetch, or to decode

    # prepare: there is nothing to read
    BLANK = "blank"  # an empty page, answered without the model (status ok, an empty text)

    # generate
    PROMPT_TOO_LONG = "prompt_too_long"
    MAX_NEW_TOKENS = "max_new_tokens"  # the answer was cut at its length limit (status truncated)
    INVALID_JSON = "invalid_json"  # the answer is not JSON (status invalid)
    SCHEMA_MISMATCH = "schema_mismatch"  # it is JSON that breaks the schema (status invalid)
    REPETITION = "repetition"  # the answer went round in circles and was cut (status truncated)


class VL01Error(Exception):
    """Base of every error raised on purpose here; `exit_code` is what `vl01` returns."""

    exit_code = ExitCode.STOPPED


class ConfigError(VL01Error):
    """What the user asked for cannot be done. Raised before any model is loaded."""

    exit_code = ExitCode.USAGE


class CheckpointError(ConfigError):
    """The checkpoint is not VL-01's layout, or not whole."""


class EngineError(VL01Error):
    """The engine is broken: its replica must be rebuilt and its units done again."""


class OutOfMemoryError(EngineError):
    """A microbatch took more memory than a GPU has left; a smaller one may fit."""


class StoppedError(VL01Error):
    """The run ended early, on request or by its own judgement: what is committed stays."""


class LedgerError(VL01Error):
    """The output cannot be written safely: its lease is held or lost, or a record is damaged."""


class RowError(VL01Error):
    """One row has no answer: it becomes a row with `reason` and `message`, and no other is hurt."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message
