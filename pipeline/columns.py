"""Which columns of a Parquet file are used: that of images or addresses, and those kept."""

import pyarrow as pa
import pyarrow.types as t

from schemas.errors import ConfigError
from schemas.rows import EXTRACTION_NAMES, GENERATED, INPUT, OUTPUT, PREPARED

_IMAGE_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "photo", "image_bytes")
_OWN_NAMES = {
    *INPUT.names,
    *PREPARED.names,
    *GENERATED.names,
    *OUTPUT.names,
    *EXTRACTION_NAMES,
}


def is_image_type(type_: pa.DataType) -> bool:
    """Encoded bytes, or the struct of Hugging Face datasets: {bytes, path}."""
    if t.is_struct(type_):
        index = type_.get_field_index("bytes")
        return index >= 0 and is_image_type(type_.field(index).type)
    return t.is_binary(type_) or t.is_large_binary(type_) or t.is_binary_view(type_)


def find_image_column(schema: pa.Schema, wanted: str | None) -> str | None:
    """The column `wanted`; if none is, one with a usual name, or the only one that could be.

    None when there is no such column, or it cannot hold encoded images.
    """
    able = [field.name for field in schema if is_image_type(field.type)]
    if wanted is not None:
        return wanted if wanted in able else None
    for usual in _IMAGE_NAMES:
        for name in able:
            if name.lower() == usual:
                return name
    return able[0] if len(able) == 1 else None


def no_image_column(schema: pa.Schema, wanted: str | None) -> str:
    """Why `find_image_column` gave None, for a user."""
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    looked_for = f"image column {wanted!r}" if wanted else "image column"
    return f"no {looked_for} of type binary or struct<bytes, path> among its columns: {columns}"


def find_column(schema: pa.Schema, image_column: str | None, uri_column: str | None) -> str | None:
    """The column that a row's image is in, or, if `uri_column` is given, its address."""
    if uri_column is None:
        return find_image_column(schema, image_column)
    index = schema.get_field_index(uri_column)
    return uri_column if index >= 0 and _is_text(schema.field(index).type) else None


def no_column(schema: pa.Schema, image_column: str | None, uri_column: str | None) -> str:
    """Why `find_column` gave None, for a user."""
    if uri_column is None:
        return no_image_column(schema, image_column)
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    return f"no column {uri_column!r} of type string among its columns: {columns}"


def _is_text(type_: pa.DataType) -> bool:
    type_ = plain_type(type_)
    return t.is_string(type_) or t.is_large_string(type_)


class KeptColumns:
    """The schema of the columns to keep, put together from the files that have them.

    Raises ConfigError: a name that the output uses itself or that is given twice, types that
    differ or that cannot be carried, a name nobody has.
    """

    def __init__(self, keep: tuple[str, ...], known: pa.Schema | None = None) -> None:
        """known: of a dataset that is there already, whose types stay."""
        self.keep = keep
        self._fixed = known is not None
        self._found: dict[str, tuple[pa.DataType, str]] = {
            field.name: (field.type, "the dataset") for field in known or []
        }
        self._others: dict[str, None] = {}  # columns of files, in order
        if clash := [name for name in keep if name in _OWN_NAMES]:
            taken = "a column of the output or of a stage has that name; expected another"
            raise ConfigError(f"cannot keep {', '.join(clash)}: {taken}")
        if twice := sorted({name for name in keep if keep.count(name) > 1}):
            raise ConfigError(f"cannot keep {', '.join(twice)} twice")

    def add(self, schema: pa.Schema, file: str) -> None:
        self._others |= dict.fromkeys(name for name in schema.names if name not in self.keep)
        for name in self.keep:
            if (index := schema.get_field_index(name)) < 0:
                continue
            type_ = plain_type(schema.field(index).type)
            if _has_views(type_):
                raise ConfigError(
                    f"cannot keep {name}: it is {type_} in {file}; views are not kept"
                )
            known, known_file = self._found.get(name, (pa.null(), file))
            if t.is_null(known) and not self._fixed:
                self._found[name] = type_, file
            elif not t.is_null(type_) and type_ != known:
                raise ConfigError(
                    f"cannot keep {name}: it is {known} in {known_file} and {type_} in {file}"
                )

    def schema(self) -> pa.Schema:
        if missing := [name for name in self.keep if name not in self._found]:
            others = f"; there are: {', '.join(self._others)}" if self._others else ""
            raise ConfigError(
                f"cannot keep {', '.join(missing)}: no file has such a column{others}"
            )
        return pa.schema([(name, self._found[name][0]) for name in self.keep])


def plain_type(type_: pa.DataType) -> pa.DataType:
    """Of a dictionary its values: every file has another dictionary. Of a view its copy: pyarrow
    can neither take nor sort rows with views.
    """
    if t.is_dictionary(type_):
        return plain_type(type_.value_type)
    views = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    return views.get(type_, type_)


def _has_views(type_: pa.DataType) -> bool:
    if t.is_string_view(type_) or t.is_binary_view(type_):
        return True
    return any(_has_views(type_.field(i).type) for i in range(type_.num_fields))
