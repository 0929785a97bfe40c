"""Fields of a page as typed columns: a JSON Schema, its Arrow type, and answers that follow it."""

from schemas.extraction.schema import Extraction, load_schema

__all__ = ["Extraction", "load_schema"]
