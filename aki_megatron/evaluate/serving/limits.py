"""What a request may cost, and how many may wait."""

from dataclasses import dataclass

from aki_megatron.data.image import MAX_PIXELS
from aki_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server. A request beyond one is refused with the number; the server goes on.

    body_bytes          largest body of a request: images in base64 take a third more than their files
    buffered_bytes      bodies of all requests together that are in memory; more are told to come again
    image_pixels        largest width x height of an image before it is decoded
    media               images and recordings of one request
    text_chars          characters of one request's messages
    positions           longest prompt and answer together, in positions of the model
    new_tokens          longest answer; a request that asks for more gets as many
    default_new_tokens  longest answer where a request does not say
    batch               requests that are answered at a time
    queue               further requests that wait; more are told to come again
    request_seconds     from the whole body to the end of the answer
    body_seconds        from the first byte of a body to its last
    header_seconds      for the headers of a request; afterwards the connection is closed
    """

    body_bytes: int = 32 * 2**20
    buffered_bytes: int = 512 * 2**20
    image_pixels: int = MAX_PIXELS
    media: int = 16
    text_chars: int = 1_000_000
    positions: int = 8192
    new_tokens: int = 2048
    default_new_tokens: int = 512
    batch: int = 16
    queue: int = 256
    request_seconds: float = 600.0
    body_seconds: float = 60.0
    header_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            least = 0 if name == "queue" else 1e-3
            assert getattr(self, name) >= least, f"{name}={getattr(self, name)}"
        if self.body_bytes > self.buffered_bytes:
            raise ConfigError(
                f"--body_megabytes {self.body_bytes >> 20} is more than all requests together may take; give "
                f"--buffer_megabytes {self.body_bytes >> 20} or more."
            )

    @property
    def requests(self) -> int:
        """Requests that are read, wait or run at a time."""
        return self.batch + self.queue
