"""A form (multipart/form-data) as bytes by field: the request and the files that its parts name.

The whole body is in memory when it is parsed, within the limit of a body; nothing is written to disk.
"""

from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from aki_megatron.evaluate.serving.errors import bad_request

REQUEST_FIELD = "request"
"""The field that holds the request as JSON."""

MAX_FIELDS = 64

MAX_HEADER_BYTES = 4096


def parse_form(content_type: str, body: bytes) -> dict[str, bytes]:
    """Return the fields and files of a form by the name of their field.

    Raises ApiError for a body that is no such form, with too many fields, or with two of one name.
    """
    _, options = parse_options_header(content_type.encode("latin-1", errors="replace"))
    boundary = options.get(b"boundary")
    if not boundary:
        raise bad_request("The form has no boundary in its Content-Type.", "request")
    reader = _FormReader()
    try:
        parser = MultipartParser(boundary, reader.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise bad_request(f"The body is not the form that its Content-Type says: {error}.", "request") from error
    if not reader.is_complete:
        raise bad_request("The form is cut off: its last boundary is missing.", "request")
    return {name: b"".join(pieces) for name, pieces in reader.fields.items()}


class _FormReader:
    """Collects what the parser finds."""

    def __init__(self) -> None:
        self.fields: dict[str, list[bytes]] = {}
        self.is_complete = False
        self._header, self._value, self._disposition = b"", b"", b""
        self._pieces: list[bytes] = []

    def callbacks(self) -> Any:
        """Return what the parser calls."""
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": self._add_to_header,
            "on_header_value": self._add_to_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._add_data,
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        self._header, self._value, self._disposition = b"", b"", b""

    def _add_to_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        self._check_header()

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._check_header()

    def _check_header(self) -> None:
        if len(self._header) + len(self._value) > MAX_HEADER_BYTES:
            raise bad_request(f"A header of the form has more than {MAX_HEADER_BYTES} bytes.", "request")

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode(errors="replace")
        if not name or name in self.fields:
            raise bad_request("Every field of the form needs a name of its own.", "request")
        if len(self.fields) == MAX_FIELDS:
            raise bad_request(f"The form has more than {MAX_FIELDS} fields.", "request")
        self._pieces = self.fields[name] = []

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        self._pieces.append(data[start:end])

    def _end(self) -> None:
        self.is_complete = True
