"""Text to UTF-8 bytes and back, with the stated treatment of what is not text.

A lone surrogate cannot be encoded and is refused. Bytes that are not UTF-8 (a model may
write any) come back as U+FFFD, one for each maximal ill-formed part, as Unicode advises.
"""

from chainrule.tokenizers.interface import TokenizerError


def to_utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text holds U+{ord(text[error.start]):04X} at character {error.start}: "
            "a lone surrogate has no UTF-8; replace it before encoding"
        ) from None


def from_utf8(data: bytes) -> str:
    return data.decode(errors="replace")
